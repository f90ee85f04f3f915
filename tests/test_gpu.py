"""Each script on a GPU that is not there: `--gpu 0`, with tensors that say cuda:0.

They compute on the CPU. What a CPU run cannot show is seen here: an operation refuses to mix the
two devices, as CUDA does, and what only a GPU gets (channels-last, pinned memory) is entered. What
CUDA's own kernels do, bf16, speed and memory are not seen.
"""

from functools import partial

import crn_imle
import lab2pix
import pix2pixhd
import pytest
import torch
from conftest import NAMES, SCORER, TINY, label_map, works
from torch.utils._python_dispatch import TorchDispatchMode, return_and_correct_aliasing
from torch.utils._pytree import tree_leaves, tree_map_only

GPU = torch.device("cuda", 0)
aten = torch.ops.aten
MIXED = {aten.copy_.default, aten._to_copy.default, aten.index.Tensor}      # also on a real GPU
pytestmark = pytest.mark.usefixtures("draw_each_street_once", "no_plots", "small_scorer")


class OnGpu(torch.Tensor):
    """Says that it is on the GPU; its numbers are in the CPU's tensor `inside`.

    To torch's own code it is a meta tensor, the one device that needs no driver.
    """
    __torch_function__ = torch._C._disabled_torch_function_impl
    device, is_cuda, is_meta = GPU, True, False

    @staticmethod
    def __new__(cls, inside: torch.Tensor):
        made = torch.Tensor._make_wrapper_subclass(
            cls, inside.size(), inside.stride(), inside.storage_offset(), dtype=inside.dtype,
            device="meta")
        made.inside = inside
        return made

    def tolist(self) -> list:
        return self.inside.tolist()

    def new_tensor(self, data) -> torch.Tensor:
        return torch.tensor(data, dtype=self.dtype, device=GPU)

    def __reduce_ex__(self, protocol: int):
        return self.inside.__reduce_ex__(protocol)

    @classmethod
    def __torch_dispatch__(cls, operation, types, arguments=(), keywords=None):
        return compute(operation, arguments, keywords or {})


class Everything(TorchDispatchMode):
    """Also what begins without a tensor on the GPU, such as torch.zeros(2, device=GPU)."""

    def __torch_dispatch__(self, operation, types, arguments=(), keywords=None):
        return compute(operation, arguments, keywords or {})


def compute(operation, arguments: tuple, keywords: dict):
    """On the CPU; refused if tensors are on both devices (numbers may be: a CPU's scalar)."""
    tensors = [t for t in tree_leaves((arguments, keywords)) if isinstance(t, torch.Tensor)]
    there = any(isinstance(t, OnGpu) for t in tensors)
    if there and operation not in MIXED:
        strangers = [tuple(t.shape) for t in tensors if not isinstance(t, OnGpu) and t.dim()]
        assert not strangers, f"{operation}: {strangers} is on the CPU, another on the GPU"
    if operation is aten.copy_.default:
        there = isinstance(arguments[0], OnGpu)
    if keywords.get("device") is not None:
        there = torch.device(keywords["device"]).type != "cpu"
        keywords = keywords | {"device": torch.device("cpu")}
    made = operation(*tree_map_only(OnGpu, lambda t: t.inside, arguments),
                     **tree_map_only(OnGpu, lambda t: t.inside, keywords))
    if not there:
        return made
    made = tree_map_only(torch.Tensor, OnGpu, made)
    return return_and_correct_aliasing(operation, arguments, keywords, made)


@pytest.fixture
def gpu(monkeypatch):
    """torch.cuda has one card."""
    generator = torch.Generator
    monkeypatch.setattr(torch, "Generator", lambda device=None: generator())
    monkeypatch.setattr(torch.Tensor, "pin_memory", lambda tensor, *device: tensor)
    for name in ("_accelerator_graph_capture_health_check", "_cuda_graph_capture_health_check"):
        monkeypatch.setattr(torch.optim.Optimizer, name, lambda optimiser: None, raising=False)
    for name, answer in dict(is_available=True, device_count=1, get_device_name="a card",
                             set_device=None, current_device=0, _lazy_init=None,
                             max_memory_allocated=0, reset_peak_memory_stats=None).items():
        monkeypatch.setattr(torch.cuda, name, lambda *_, answer=answer: answer)
    torch._C._set_only_lift_cpu_tensors(True)       # torch.tensor([1], device=GPU) by way of here
    with torch.autograd.set_multithreading_enabled(False), Everything():
        yield
    torch._C._set_only_lift_cpu_tensors(False)


def test_this_gpu_computes_learns_and_refuses_strangers(gpu):
    net = torch.nn.Conv2d(3, 4, 3).to(GPU)
    x = torch.randn(2, 3, 8, 8, device=GPU)
    before = net.weight.detach().cpu()
    net(x).square().mean().backward()
    torch.optim.Adam(net.parameters(), fused=True).step()
    assert net.weight.device == net.weight.grad.device == GPU and before.device.type == "cpu"
    assert not torch.equal(before, net.weight.detach().cpu())
    with pytest.raises(AssertionError, match="on the CPU"):
        x + torch.zeros(8)
    with pytest.raises(AssertionError, match="on the CPU"):
        net(torch.zeros(2, 3, 8, 8))


@pytest.mark.parametrize("make, shape", [
    (partial(crn_imle.LayerNorm, 1), (3, 6, 5, 8)), (partial(crn_imle.LayerNorm, 1), (1, 4, 1, 1)),
    (partial(crn_imle.LayerNorm, 1), (1, 1, 5, 8)), (pix2pixhd.InstanceNorm, (1, 6, 5, 8)),
    (pix2pixhd.InstanceNorm, (2, 6, 5, 8)), (lab2pix.InstanceNorm, (1, 6, 5, 8))])
def test_norms_have_other_kernels_on_a_gpu_and_the_same_results(make, shape, gpu):
    """Value and gradients of a norm that computes by another formula there."""
    norm = make(shape[1])
    x, g = 3 * torch.randn(shape) + 1, torch.randn(shape)
    for p in norm.parameters():
        torch.nn.init.normal_(p)
    found = {}
    for device in (torch.device("cpu"), GPU):
        own = x.to(device).requires_grad_()
        inputs = [own, *norm.to(device).parameters()]
        y = norm(own)
        found[device.type] = [t.detach().cpu() for t in (y, *torch.autograd.grad(
            y, inputs, g.to(device)))]
    for here, there in zip(found["cpu"], found["cuda"]):
        torch.testing.assert_close(there, here, rtol=1e-4, atol=1e-5)


EVERY_MODE = {
    "pix2pix": f"""{TINY["pix2pix"]} --steps 2 --loss cGAN
        {TINY["pix2pix"]} --steps 2
        --resume --steps 4
        sample --samples 3
        sample --input a.png --output b.png
        trace
        evaluate {SCORER}""",
    "pix2pixhd": f"""{TINY["pix2pixhd"]} --steps 1 --loss GAN+FM+VGG
        {TINY["pix2pixhd"]} --size 128 256 --enhancers 1 --epochs 1 --enhancer-epochs 1 1
        --resume --enhancer-epochs 1 2
        sample --samples 2 --vary car
        encode
        edit --style 10001=0 --set 9000=vegetation --remove 10002 --paste 10000@2,40 --undo
        trace
        evaluate {SCORER}""",
    "crn_imle": f"""{TINY["crn_imle"]} --model crn --outputs 3 --steps 1
        {TINY["crn_imle"]} --steps 2
        --resume --steps 3
        sample --samples 2
        interpolate
        edit --set car=road 4,8,12,28=car
        video
        trace
        evaluate --limit 2""",
    "lab2pix": f"""{TINY["lab2pix-V1"]} --steps 1
        {TINY["lab2pix-full"]} --steps 1
        sample --samples 2 --limit 2"""}


@pytest.mark.parametrize("name", [
    pytest.param(name, marks=[pytest.mark.slow] * (name != "pix2pix")) for name in NAMES])
def test_every_mode_keeps_to_its_device(name, gpu):
    label_map("a.png")
    for line in EVERY_MODE[name].splitlines():
        works(name, f"{line} --gpu 0")             # of two --gpu the last counts
