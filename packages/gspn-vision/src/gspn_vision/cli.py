"""The command `gspn-vision`: train, validate, predict, visualize, profile, benchmark, export."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from . import __version__, config


def _checkpoint_options(parser: argparse.ArgumentParser, *, required: bool = True) -> None:
    parser.add_argument("--checkpoint", required=required, help="folder of a run or of one checkpoint")
    parser.add_argument(
        "--which",
        choices=("best", "latest"),
        default="best",
        help="checkpoint of a run (default: best)",
    )
    parser.add_argument(
        "--weights",
        choices=("auto", "model", "ema"),
        default="auto",
        help="averaged weights or plain ones (default: averaged if there are any)",
    )


def _unreadable_option(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--unreadable",
        choices=("skip", "stop"),
        default="stop",
        help="what to do with an image that cannot be read (default: stop)",
    )


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="gspn-vision", description=__doc__)
    parser.add_argument("--version", action="version", version=f"%(prog)s {__version__}")
    commands = parser.add_subparsers(dest="command", required=True)

    train = commands.add_parser("train", help="train a model, or continue a run")
    train.add_argument("--config", help="preset or YAML file; options given here come on top")
    train.add_argument("--presets", action="store_true", help="list the presets and stop")
    config.add_arguments(train)

    validate = commands.add_parser("validate", help="measure a checkpoint on a data set")
    _checkpoint_options(validate)
    validate.add_argument("--data", help="data set (default: the one it was trained with)")
    validate.add_argument("--data-root", help="folder that a timm data set is stored in")
    validate.add_argument("--split", help="split of the data (default: the validation split)")
    validate.add_argument("--batch-size", type=int, default=128, help="images per batch (default: 128)")
    validate.add_argument("--workers", type=int, default=0, help="loader processes (default: 0)")
    validate.add_argument("--cpu", action="store_true", help="use the CPU even if there is a GPU")
    validate.add_argument("--predictions", help="CSV file to write every image's prediction to")
    validate.add_argument("--json", action="store_true", help="print JSON, with the confusion matrix")
    _unreadable_option(validate)

    predict = commands.add_parser("predict", help="name the likeliest classes of images")
    predict.add_argument(
        "images",
        nargs="+",
        help="image files, folders of them, or digits:N for number N of scikit-learn's digits",
    )
    _checkpoint_options(predict)
    predict.add_argument("--top", type=int, default=5, help="classes per image (default: 5)")
    predict.add_argument("--json", action="store_true", help="print JSON")
    _unreadable_option(predict)

    visualize = commands.add_parser("visualize", help="draw where a pixel's information goes")
    visualize.add_argument("image", help="a photograph, or digits:N")
    _checkpoint_options(visualize)
    visualize.add_argument("--output", default="propagation.png", help="PNG to write (default: %(default)s)")
    visualize.add_argument(
        "--pixel",
        nargs=2,
        type=int,
        metavar=("ROW", "COLUMN"),
        help="in the photograph (default: centre)",
    )
    visualize.add_argument("--layer", help="layer to show (default: the first that scans the whole map)")
    visualize.add_argument("--all-layers", action="store_true", help="one page of all layers instead of one layer")
    visualize.add_argument("--list-layers", action="store_true", help="list the layers and stop")
    visualize.add_argument(
        "--size",
        nargs=2,
        type=int,
        metavar=("HEIGHT", "WIDTH"),
        help="resize the photograph (default: its own size)",
    )

    profile = commands.add_parser("profile", help="count parameters and multiply-adds, beside the published ones")
    profile.add_argument("models", nargs="*", help="timm models (default: all of this package)")
    profile.add_argument(
        "--size", nargs=2, type=int, metavar=("HEIGHT", "WIDTH"), help="input size (default: the model's own)"
    )
    profile.add_argument("--json", action="store_true", help="print JSON")

    benchmark = commands.add_parser("benchmark", help="measure images per second, beside other timm models")
    benchmark.add_argument("models", nargs="*", help="timm models (default: gspn_tiny and gspn2_tiny)")
    benchmark.add_argument(
        "--no-peers", action="store_true", help="leave out Swin-T, ConvNeXt-T, MambaOut-T and DeiT-S"
    )
    benchmark.add_argument(
        "--batch-sizes", nargs="+", type=int, default=[1, 16], help="images per step (default: 1 16)"
    )
    benchmark.add_argument(
        "--mode", choices=("inference", "training", "both"), default="both", help="what to measure (default: both)"
    )
    benchmark.add_argument("--size", type=int, default=224, help="height and width (default: 224)")
    benchmark.add_argument("--precision", choices=("no", "bf16"), default="no", help="mixed precision (default: no)")
    benchmark.add_argument("--compile", action="store_true", help="compile the models with torch.compile")
    benchmark.add_argument("--repeats", type=int, default=10, help="timed steps of each model (default: 10)")
    benchmark.add_argument("--cpu", action="store_true", help="use the CPU even if there is a GPU")
    benchmark.add_argument("--json", help="file to write results, device and versions to")

    export = commands.add_parser("export", help="write a model as ONNX or for torch.export, and check the file")
    export.add_argument("model", nargs="?", help="timm model, with fresh weights; or give --checkpoint")
    _checkpoint_options(export, required=False)
    export.add_argument("--format", choices=("onnx", "torch"), default="onnx", help="what to write (default: onnx)")
    export.add_argument("--output", help="file to write (default: model.onnx or model.pt2)")
    export.add_argument(
        "--size", nargs=2, type=int, metavar=("HEIGHT", "WIDTH"), help="input size (default: the model's own)"
    )
    export.add_argument("--batch", type=int, help="images at a time (default: any number)")
    export.add_argument("--dynamic-size", action="store_true", help="leave height and width open, too")
    return parser


def _train(arguments: argparse.Namespace) -> None:
    if arguments.presets:
        print("\n".join(config.preset_names()))
        return
    options = config.from_arguments(arguments.config, vars(arguments))
    from .train import Trainer

    trainer = Trainer(options)
    summary = trainer.run()
    if trainer.accelerator.is_main_process:
        print(json.dumps(summary))


def _validate(arguments: argparse.Namespace) -> None:
    from accelerate import PartialState

    from .evaluate import validate, write_predictions

    metrics, predictions, source, class_names = validate(
        arguments.checkpoint,
        data=arguments.data,
        data_root=arguments.data_root,
        split=arguments.split,
        which=arguments.which,
        weights=arguments.weights,
        batch_size=arguments.batch_size,
        workers=arguments.workers,
        unreadable=arguments.unreadable,
        cpu=arguments.cpu,
        progress=sys.stderr.isatty(),
    )
    if not PartialState().is_main_process:
        return
    if arguments.predictions:
        write_predictions(Path(arguments.predictions), predictions, source, class_names)
    values: dict[str, Any] = {
        "top1": metrics.top1,
        "top5": metrics.top5,
        "loss": metrics.loss,
        "images": metrics.images,
    }
    if arguments.json:
        values |= {"class_names": class_names, "confusion": metrics.confusion.tolist()}
        print(json.dumps(values))
        return
    print(f"top-1 {metrics.top1:.2f}%, top-5 {metrics.top5:.2f}%, loss {metrics.loss:.4f}, {metrics.images} images")
    wrong = metrics.confusion.clone().fill_diagonal_(0)
    for place in wrong.flatten().argsort(descending=True, stable=True)[:5].tolist():
        truth, guess = divmod(place, len(class_names))
        if wrong[truth, guess]:
            print(f"  {int(wrong[truth, guess])} x {class_names[truth]} taken for {class_names[guess]}")


def _predict(arguments: argparse.Namespace) -> None:
    from .checkpoint import load_model
    from .data import Unreadable
    from .predict import as_dict, as_text, predict

    model, preprocessing, state = load_model(arguments.checkpoint, which=arguments.which, weights=arguments.weights)
    guesses = predict(
        model,
        preprocessing,
        state["class_names"],
        arguments.images,
        top=arguments.top,
        unreadable=Unreadable(arguments.unreadable),
    )
    if arguments.json:
        print(json.dumps([as_dict(guess) for guess in guesses]))
        return
    for guess in guesses:
        print(as_text(guess))


def _visualize(arguments: argparse.Namespace) -> None:
    from .checkpoint import load_model
    from .predict import open_image
    from .visualize import draw, draw_page, heat_maps, layers

    model, preprocessing, state = load_model(arguments.checkpoint, which=arguments.which, weights=arguments.weights)
    if arguments.list_layers:
        print("\n".join(layers(model)))
        return
    photograph = open_image(arguments.image)[0]
    title = f"{state['model']['name']} on {Path(arguments.image).name}"
    if arguments.all_layers and arguments.layer is not None:
        raise ValueError(f"layer must not be given with --all-layers, got {arguments.layer!r}")
    results = [
        heat_maps(model, preprocessing, photograph, pixel=arguments.pixel, layer=layer, size=arguments.size)
        for layer in (layers(model) if arguments.all_layers else [arguments.layer])
    ]
    if arguments.all_layers:
        draw_page(results, arguments.output, title=title)
    else:
        draw(results[0], arguments.output, title=title)
    print(arguments.output)


def _profile(arguments: argparse.Namespace) -> None:
    import timm

    from .profile import profile, table

    names = arguments.models or timm.list_models("gspn*")
    size = tuple(arguments.size) if arguments.size else None
    profiles = [profile(name, size) for name in names]
    print(json.dumps([p.as_dict() for p in profiles]) if arguments.json else table(profiles))


def _benchmark(arguments: argparse.Namespace) -> None:
    from . import speed
    from .checkpoint import write_atomically

    names = arguments.models or ["gspn_tiny", "gspn2_tiny"]
    if not arguments.no_peers:
        names = [*names, *(peer for peer in speed.PEERS if peer not in names)]
    modes: Any = ("inference", "training") if arguments.mode == "both" else (arguments.mode,)
    settings: dict[str, Any] = {
        "modes": modes,
        "size": arguments.size,
        "precision": arguments.precision,
        "compile": arguments.compile,
        "repeats": arguments.repeats,
        "device": "cpu" if arguments.cpu else None,
    }
    rows = speed.measure(names, arguments.batch_sizes, **settings, progress=sys.stderr.isatty())
    if arguments.json:
        write_atomically(Path(arguments.json), json.dumps(speed.report(rows, **settings), indent=1) + "\n")
    print(speed.table(rows))


def _export(arguments: argparse.Namespace) -> None:
    from .export import SUFFIXES, export, open_model

    model, (channels, height, width) = open_model(
        arguments.model, arguments.checkpoint, which=arguments.which, weights=arguments.weights
    )
    height, width = arguments.size or (height, width)
    exported = export(
        model,
        arguments.output or f"model{SUFFIXES[arguments.format]}",
        input_size=(channels, height, width),
        format=arguments.format,
        batch=arguments.batch,
        dynamic_size=arguments.dynamic_size,
    )
    print(exported.as_text())


_COMMANDS: dict[str, Callable[[argparse.Namespace], None]] = {
    "train": _train,
    "validate": _validate,
    "predict": _predict,
    "visualize": _visualize,
    "profile": _profile,
    "benchmark": _benchmark,
    "export": _export,
}


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; return 0, or 2 after an error of the user's, or 1 if training or an export went wrong."""
    arguments = _parser().parse_args(argv)
    try:
        _COMMANDS[arguments.command](arguments)
    except (ValueError, FileNotFoundError, ImportError, ArithmeticError) as error:
        # An error in a loader process comes with its traceback; its own line is the last.
        print(f"gspn-vision: error: {str(error).strip().splitlines()[-1]}", file=sys.stderr)
        return 1 if isinstance(error, ArithmeticError) else 2
    import torch.distributed as dist

    # The threads of a group that is left to the end of the interpreter may abort it.
    if dist.is_available() and dist.is_initialized():
        dist.destroy_process_group()
    return 0


if __name__ == "__main__":
    sys.exit(main())
