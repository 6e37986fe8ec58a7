"""Mounting among other things that change a UNet: LoRA and offloading, in every order."""

import functools
import pickle

import pytest
import torch
from accelerate import cpu_offload, cpu_offload_with_hook
from accelerate.hooks import ModelHook, add_hook_to_module, remove_hook_from_module
from t2i_cases import run, same, sd_unet

from gspn_t2i import GSPNAdapter


def _events(mounted, loaded, fused):
    """What can happen next, and the state after it."""
    yield ("unmount", (False, loaded, fused)) if mounted else ("mount", (True, loaded, fused))
    if not loaded:
        yield "load", (mounted, True, fused)
        return
    yield "unload", (mounted, False, False)
    yield ("unfuse", (mounted, True, False)) if fused else ("fuse", (mounted, True, True))


def _happen(unet, event, lora):
    if event == "load":
        unet.load_lora_adapter(lora, prefix=None)
    elif event == "mount":
        GSPNAdapter.for_unet(unet).mount(unet)
    elif event == "unmount":
        unet.gspn_adapter.unmount()
    else:
        getattr(unet, f"{event}_lora")()


def test_every_order_of_mount_and_lora():
    """All sequences of up to five events leave a UNet that one without mount and unmount would be."""
    peft = pytest.importorskip("peft", reason="diffusers loads LoRA with peft")
    shape = {"block_out_channels": (16, 32)}
    shape |= {"down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"), "mid_block_type": None}
    shape |= {"up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D")}
    donor = sd_unet(**shape)
    donor.add_adapter(peft.LoraConfig(r=2, target_modules=["to_q", "to_k", "to_out.0"], init_lora_weights=False))
    lora = peft.get_peft_model_state_dict(donor)
    assert any(".attn1." in key for key in lora) and any(".attn2." in key for key in lora)

    @functools.cache
    def without_adapter(path):
        unet = sd_unet(**shape)
        for event in path:
            _happen(unet, event, lora)
        return unet.state_dict(), run(unet)

    seen = set()

    def go(before, state, path):
        for event, (mounted, loaded, fused) in _events(*state):
            unet, now = pickle.loads(before), (*path, event)
            _happen(unet, event, lora)
            if not mounted:
                expected, out = without_adapter(tuple(e for e in now if e not in ("mount", "unmount")))
                assert same(unet.state_dict(), expected) and torch.allclose(run(unet), out, atol=1e-5), now
            seen.add(" ".join(now))
            if len(now) < 5:
                go(pickle.dumps(unet), (mounted, loaded, fused), now)

    go(pickle.dumps(sd_unet(**shape)), (False, False, False), ())
    # Those that failed once, among others.
    assert {"load mount unload unmount", "mount load unmount unload mount", "mount load fuse unload unmount"} <= seen


@pytest.mark.parametrize("discard", [False, True])
def test_a_lora_acts_on_the_rest(discard):
    """Its part for the self-attentions has no effect while mixers replace them."""
    peft = pytest.importorskip("peft", reason="diffusers loads LoRA with peft")
    donor = sd_unet()
    donor.add_adapter(peft.LoraConfig(r=2, target_modules=["to_q", "to_k", "to_out.0"], init_lora_weights=False))
    lora = peft.get_peft_model_state_dict(donor)
    outs = []
    for keys in (".attn1.", ".attn2.", ".attn"):
        unet = sd_unet()
        torch.manual_seed(0)
        adapter = GSPNAdapter.for_unet(unet).mount(unet, discard=discard)
        unet.fuse_qkv_projections()
        if not (discard and keys == ".attn1."):
            unet.load_lora_adapter({key: value for key, value in lora.items() if keys in key}, prefix=None)
        outs.append(run(unet))
        assert same(adapter.state_dict(), adapter.own_weights())
    assert torch.allclose(outs[1], outs[2], atol=1e-5) and not torch.allclose(outs[0], outs[1], atol=1e-3)


def test_a_hook_around_an_attention():
    """It holds the forward that it found: refused, whether it came before or after mounting."""
    unet = sd_unet()
    adapter = GSPNAdapter.for_unet(unet)
    name = next(iter(adapter.config.layers))
    for events in (("hook", "mount"), ("mount", "hook", "unmount")):
        for event in events[:-1]:
            add_hook_to_module(unet.get_submodule(name), ModelHook()) if event == "hook" else adapter.mount(unet)
        out = run(unet)
        with pytest.raises(ValueError, match=f"{name} .*its forward"):
            adapter.mount(unet) if events[-1] == "mount" else adapter.unmount()
        assert torch.equal(run(unet), out)
        remove_hook_from_module(unet.get_submodule(name))
        vars(unet.get_submodule(name)).pop("forward", None)
    adapter.unmount()
    run(unet)


def _sequential(unet):
    cpu_offload(unet, torch.device("cpu"))


def _model(unet):
    cpu_offload_with_hook(unet, torch.device("cpu"))


def _group(unet, kind, **options):
    cpu = torch.device("cpu")
    unet.enable_group_offload(onload_device=cpu, offload_device=cpu, offload_type=kind, **options)


OFFLOADS = {
    "sequential": _sequential,
    "model": _model,
    "leaves": lambda unet: _group(unet, "leaf_level"),
    "blocks": lambda unet: _group(unet, "block_level", num_blocks_per_group=1),
}


@pytest.mark.filterwarnings("ignore:.*pin_memory.*:UserWarning")
@pytest.mark.parametrize("begin", ["before for_unet", "before mount", "mounted"])
@pytest.mark.parametrize("offload", OFFLOADS)
def test_offloading_and_back(offload, begin, tmp_path):
    """No weight is lost, whenever the UNet begins to be offloaded."""
    unet = sd_unet()
    before, state = run(unet), {key: value.clone() for key, value in unet.state_dict().items()}
    torch.manual_seed(0)
    reference = GSPNAdapter.for_unet(unet)
    if begin == "before for_unet":
        OFFLOADS[offload](unet)
    torch.manual_seed(0)
    adapter = GSPNAdapter.for_unet(unet)
    assert same(adapter.state_dict(), reference.state_dict())
    if begin == "before mount":
        OFFLOADS[offload](unet)
    adapter.mount(unet)
    if begin == "mounted":
        OFFLOADS[offload](unet)
    other = sd_unet()
    reference.mount(other)
    mounted = run(other)
    assert torch.equal(run(unet), mounted)
    if offload == "sequential":
        assert adapter.mixers[next(iter(adapter.mixers))].to_q.weight.is_meta
    adapter.save_pretrained(tmp_path)
    assert same(GSPNAdapter.from_pretrained(tmp_path).state_dict(), reference.state_dict())
    adapter.unmount()
    assert torch.equal(run(unet), before)
    assert same(adapter.state_dict(), reference.state_dict())
    adapter.mount(unet)
    assert torch.equal(run(unet), mounted)
    adapter.unmount()
    remove_hook_from_module(unet, recurse=True)
    assert same(unet.state_dict(), state)
