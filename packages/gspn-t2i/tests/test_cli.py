"""The command line: its options, and what is said of mistakes."""

import json

import pytest
from diffusers import DiffusionPipeline

from gspn_t2i import cli

OPTIONS = {
    "distill": "accumulate adapter batch_size bottleneck cache caption_dropout checkpoint_every chunk_size clip_grad "
    "config data device ema_decay ema_warmup feature_weight gradient_checkpointing image_column init keep_attention "
    "keep_checkpoints log_every lr lr_schedule mirror mixer noise_weight out pipeline precision progress proxy resume "
    "sample_every sample_guidance sample_prompts sample_steps seed size snr_gamma split steps teacher_weight "
    "tensorboard text_column warmup_steps weight_decay workers",
    "generate": "adapter batch_size config device dtype guidance height images_per_prompt negative_prompt offload out "
    "pipeline progress prompt prompt_file seed steps vae_tiling width",
    "upscale": "adapter chunked_feed_forward config cosine_scale_1 cosine_scale_2 demofusion device dilated "
    "dilated_batch dtype guidance height image layerwise_casting memory negative_prompt offload out pipeline progress "
    "prompt scale seed sigma skip_residual split_guidance steps steps_from_4k strengths target vae_tiling width",
    "evaluate": "adapter allow_missing batch_size caption_seed captions clip_config clip_model clip_pretrained config "
    "count device dtype guidance height images inception_weights metric_batch_size metrics negative_prompt offload "
    "out pipeline prefix progress reference resolution save_reference seed steps vae_tiling width",
    "benchmark": "batch chunk_size config device dtype family generation json measure_up_to mixers plot progress "
    "repeats sizes steps",
    "tiny": "config family out seed",
}


@pytest.mark.parametrize("command", OPTIONS)
def test_options(command, capsys):
    with pytest.raises(SystemExit) as ended:
        cli.main([command, "--help"])
    assert ended.value.code == 0
    words = {word.rstrip(",") for word in capsys.readouterr().out.split() if word.startswith("--")}
    # A list has a second form, --prompt+, which adds to it.
    assert {word[2:].rstrip("+") for word in words if "print" not in word} - {"help"} == set(OPTIONS[command].split())


def test_tiny_then_generate(tmp_path, capsys):
    folder = tmp_path / "pipeline"
    assert cli.main(["tiny", "--family", "sd15", "--out", str(folder)]) == 0
    assert DiffusionPipeline.from_pretrained(folder).unet.config.cross_attention_dim == 32
    arguments = ["generate", "--pipeline", str(folder), "--prompt", '["a one", "a two"]', "--steps", "1"]
    assert cli.main([*arguments, "--images-per-prompt=1", "--out", str(tmp_path / "out"), "--progress", "false"]) == 0
    assert json.loads(capsys.readouterr().out.splitlines()[-1])["images"] == 2
    assert len(list((tmp_path / "out").glob("*.png"))) == 2


@pytest.mark.parametrize(
    "arguments,message",
    [
        (["--pipeline", "no/such/one", "--prompt", "a"], "no pipeline 'no/such/one'"),
        (["--pipeline", "x"], "prompt or prompt_file must be given"),
    ],
)
def test_mistakes(arguments, message, capsys):
    assert cli.main(["generate", *arguments]) == 2
    err = capsys.readouterr().err
    assert err.startswith("gspn-t2i: error: ") and message in err and err.count("\n") == 1


@pytest.mark.parametrize("arguments", [["generate", "--stepz", "2"], ["benchmark", "--sizes", "[12]"], ["paint"]])
def test_mistakes_that_the_parser_sees(arguments, capsys):
    with pytest.raises(SystemExit) as ended:
        cli.main(arguments)
    assert ended.value.code == 2
    assert arguments[1 if len(arguments) > 1 else 0].lstrip("-") in capsys.readouterr().err
