"""Names that options have in the scripts of timm and diffusers, and ours for the same."""

from __future__ import annotations

from collections.abc import Collection, Sequence

OURS = {
    # timm
    "aa": "auto_augment",
    "checkpoint_hist": "keep_checkpoints",
    "data_dir": "data",
    "drop": "drop_rate",
    "drop_path": "drop_path_rate",
    "grad_accum_steps": "accumulate",
    "grad_checkpointing": "gradient_checkpointing",
    "img_size": "image_size",
    "initial_checkpoint": "start_from",
    "log_interval": "log_every",
    "mixup_prob": "mix_probability",
    "model_ema_decay": "ema_decay",
    "opt": "optimizer",
    "opt_kwargs": "optimizer_kwargs",
    "output": "out",
    "ratio": "crop_ratio",
    "reprob": "random_erasing",
    "sched": "lr_schedule",
    "smoothing": "label_smoothing",
    # diffusers
    "adam_weight_decay": "weight_decay",
    "checkpointing_steps": "checkpoint_every",
    "dataloader_num_workers": "workers",
    "gradient_accumulation_steps": "accumulate",
    "guidance_scale": "guidance",
    "learning_rate": "lr",
    "lr_scheduler": "lr_schedule",
    "lr_warmup_steps": "warmup_steps",
    "max_grad_norm": "clip_grad",
    "max_train_steps": "steps",
    "mixed_precision": "precision",
    "num_images_per_prompt": "images_per_prompt",
    "num_inference_steps": "sampler_steps",
    "num_train_epochs": "epochs",
    "output_dir": "out",
    "pretrained_model_name_or_path": "pipeline",
    "prompt": "prompts",
    "resolution": "image_size",
    "train_batch_size": "batch_size",
    "train_data_dir": "data",
}


# Options of others whose values are not ours, but which ours replaces.
INSTEAD = {"height": "image_size", "width": "image_size"}


def translate(words: Sequence[str], options: Collection[str]) -> list[str]:
    """Replace the names of other projects on a command line by ours, where a command has that option."""
    ours = {f"--{theirs.replace('_', '-')}": name for theirs, name in OURS.items() if theirs not in options}
    translated = []
    for word in words:
        name, equals, value = word.partition("=")
        spelled = ours.get(name.replace("_", "-"))
        known = spelled is not None and spelled in options
        translated.append(f"--{spelled.replace('_', '-')}{equals}{value}" if known and spelled else word)
    return translated
