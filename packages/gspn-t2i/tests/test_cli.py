"""The command line: its options, its results, and its errors."""

import importlib
import json
import sys

import pytest
from diffusers import DiffusionPipeline

from gspn_core.runs.options import ImageSize, parse
from gspn_t2i import cli

OPTIONS = {
    "distill": "accumulate batch_size betas bottleneck buckets cache caption_dropout checkpoint_every chunk_size "
    "clip_grad data device ema_decay ema_warmup feature_weight gradient_checkpointing guidance hflip "
    "image_column image_size init keep_attention keep_checkpoints log_every lr lr_schedule min_lr "
    "mixer noise_weight out pipeline pipeline_config precision progress proxy random_crop resume "
    "revision sample_every sample_prompts sampler_steps seed snr_gamma split start_from steps "
    "teacher_weight tensorboard text_column tf32 trackers unreadable use_8bit_adam val_data val_split "
    "validate_every variant warmup_steps weight_decay workers",
    "generate": "adapter batch_size control_image control_scale controlnet device guidance image_size "
    "images_per_prompt lora lora_scales negative_prompt offload out pipeline pipeline_config "
    "precision progress prompt_file prompts revision sampler_steps scheduler scheduler_kwargs seed "
    "vae_tiling variant",
    "upscale": "adapter chunked_feed_forward cosine_scale_1 cosine_scale_2 demofusion device dilated "
    "dilated_batch guidance image image_size layerwise_casting lora lora_scales memory "
    "negative_prompt offload out pipeline pipeline_config precision progress prompt revision "
    "sampler_steps sampler_steps_from_4k scale scheduler scheduler_kwargs seed sigma skip_residual "
    "split_guidance strength_schedule strengths target vae_tiling variant",
    "evaluate": "adapter allow_missing batch_size caption_seed captions clip_config clip_model clip_pretrained "
    "count device fid_size guidance image_size inception_weights lora lora_scales metric_batch_size "
    "metrics negative_prompt offload out pipeline pipeline_config precision prefix progress reference "
    "revision sampler_steps samples save_reference scheduler scheduler_kwargs seed vae_tiling variant",
    "benchmark": "batch_size chunk_size device family generation image_sizes measure_up_to mixers out plot precision "
    "progress repeats sampler_steps",
    "tiny": "family out seed",
}
SWITCHES = {"allow_missing", "demofusion", "dilated", "ema_warmup", "generation", "gradient_checkpointing"}
SWITCHES |= {"layerwise_casting", "progress", "skip_residual", "tensorboard"}
SWITCHES |= {"random_crop", "tf32", "use_8bit_adam"}


@pytest.mark.parametrize("command", OPTIONS)
def test_options(command, capsys):
    with pytest.raises(SystemExit) as ended:
        cli.main([command, "--help"])
    assert ended.value.code == 0
    words = {word.rstrip(",") for word in capsys.readouterr().out.split() if word.startswith("--")}
    names = {word[2:].replace("-", "_") for word in words} - {"help", "config", "print_config", "json"}
    options = set(OPTIONS[command].split())
    assert names == options | {f"no_{name}" for name in options & SWITCHES}


def test_tiny_then_generate(tmp_path, capsys):
    folder = tmp_path / "pipeline"
    assert cli.main(["tiny", "--family", "sd15", "--out", str(folder)]) == 0
    assert capsys.readouterr().out == f"folder  {folder}\n"
    assert DiffusionPipeline.from_pretrained(folder).unet.config.cross_attention_dim == 32
    capsys.readouterr()
    words = ["generate", "--pipeline", str(folder), "--prompts", "a one", "a two", "--sampler-steps", "1"]
    words += ["--image-size", "64x72", "--images-per-prompt=1", "--out", str(tmp_path / "out"), "--no-progress"]
    assert cli.main([*words, "--json"]) == 0
    output = capsys.readouterr()
    assert json.loads(output.out)["images"] == 2 and not output.err
    assert len(list((tmp_path / "out" / "images").glob("*.png"))) == 2
    assert cli.main(words) == 0
    assert "\ndrawn    0\n" in capsys.readouterr().out


@pytest.mark.parametrize(
    "command,words,name,value",
    [
        ("benchmark", "--image-sizes 512x512", "image_sizes", (ImageSize(512, 512),)),
        ("benchmark", "--mixers gspn2", "mixers", ("gspn2",)),
        ("evaluate", "--samples x --captions y --metrics clip_t", "metrics", ("clip_t",)),
        ("evaluate", "--samples x --captions y --reference z --metrics fid clip_t", "metrics", ("fid", "clip_t")),
        ("distill", "--pipeline x --data y --keep-attention mid_block", "keep_attention", ["mid_block"]),
        (
            "distill",
            "--pipeline x --data y --buckets 512x512 448x576",
            "buckets",
            [ImageSize(512, 512), ImageSize(448, 576)],
        ),
        ("distill", "--pipeline x --data y --betas 0.9 0.95", "betas", (0.9, 0.95)),
        ("upscale", "--pipeline x --prompt y --target 160x160", "target", ImageSize(160, 160)),
        ("upscale", "--pipeline x --prompt y --scale 2 --strengths 0.3", "strengths", [0.3]),
        ("generate", "--pipeline x --prompts [cat:dog:0.5]", "prompts", ["[cat:dog:0.5]"]),
        ("generate", "--pipeline x --prompts a [b] {c} 5 null", "prompts", ["a", "[b]", "{c}", "5", "null"]),
        ("generate", "--pipeline x --prompt a", "prompts", ["a"]),
        ("generate", "--pipeline x --prompts a --lora l --lora-scales 0.5", "lora_scales", [0.5]),
        ("upscale", "--pipeline x --prompt [cat:dog:0.5] --scale 2", "prompt", "[cat:dog:0.5]"),
    ],
)
def test_lists_and_texts_as_words(command, words, name, value):
    module, _, kind = cli.COMMANDS[command].options.partition(":")
    assert getattr(parse(getattr(importlib.import_module(module), kind), words.split()), name) == value


def test_a_closed_output(tmp_path, monkeypatch, capsys):
    """As with `>&-` in a shell: refused before any work, since the result would be lost."""
    monkeypatch.setattr(sys, "stdout", None)
    assert cli.main(["tiny", "--family", "sd15", "--out", str(tmp_path / "pipeline")]) == 2
    assert capsys.readouterr().err.startswith("gspn-t2i: error: standard output is closed")
    assert not (tmp_path / "pipeline").exists()


@pytest.mark.parametrize(
    "words,message",
    [
        (["generate", "--pipeline", "no/such/one", "--prompts", "a"], "no pipeline 'no/such/one'"),
        (["generate", "--pipeline", "x"], "prompts or prompt_file must be set"),
        (["generate", "--pipeline", "x", "--promts", "a"], "unknown option '--promts', did you mean '--prompts'?"),
        (
            ["generate", "--pipeline", "x", "--prompt", "a", "--prompt", "b"],
            "a list is written as words: --prompts FIRST",
        ),
        (
            ["generate", "--pipeline", "x", "--prompts", "a", "--controlnet", "c"],
            "controlnet and control_image need each",
        ),
        (
            ["generate", "--pipeline", "x", "--prompts", "a", "--lora-scales", "1"],
            "lora_scales must be one of each LoRA, 0",
        ),
        (["benchmark", "--image-sizes", "12"], "image_sizes must be multiples of 8, got 12x12"),
        (["distill", "--config", "sd3"], "no configuration file 'sd3'; shipped are sd15, sdxl"),
        (["upscale", "--pipeline", "x", "--prompt", "a"], "either scale or target must be set"),
    ],
)
def test_errors(words, message, capsys):
    assert cli.main(words) == 2
    errors = capsys.readouterr().err
    assert errors.startswith("gspn-t2i: error: ") and message in errors and errors.count("\n") == 1


def test_an_unknown_command(capsys):
    with pytest.raises(SystemExit) as ended:
        cli.main(["paint"])
    assert ended.value.code == 2 and "paint" in capsys.readouterr().err
