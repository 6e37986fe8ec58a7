"""The command line: its options, its results, and its errors."""

import json

import pytest
from diffusers import DiffusionPipeline

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
    "words,message",
    [
        (["generate", "--pipeline", "no/such/one", "--prompts", "a"], "no pipeline 'no/such/one'"),
        (["generate", "--pipeline", "x"], "prompts or prompt_file must be set"),
        (["generate", "--pipeline", "x", "--promts", "a"], "unknown option '--promts', did you mean '--prompts'?"),
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
