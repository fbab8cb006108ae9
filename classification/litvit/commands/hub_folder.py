"""Make a folder of a run's best weights for the Hugging Face Hub: litvit hub-folder RUN FOLDER."""

import csv
import json
import shutil
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import yaml
from huggingface_hub import HfApi
from timm.models import get_pretrained_cfg, save_for_hf
from torch import nn

from litvit.checkpoints import load_weights
from litvit.cli import ArgumentParser, import_modules, model_name
from litvit.errors import InputError, one_line
from litvit.models import Backbone
from litvit.runs.folder import BEST_WEIGHTS, SETTINGS, SUMMARY, read_description
from litvit.training.flags import TRACEBACK_HELP, HelpFormatter, build_parser
from litvit.training.model import ModelConfig, build_model
from litvit.training.recipe import load_recipe

# What the description of best weights must say.
NEEDED = (
    *("model", "model_kwargs", "num_classes", "in_chans", "img_size", "mean", "std", "interpolation", "crop_pct"),
    *("top1", "epoch"),
)
METRICS = {"eval_top5": ("accuracy", "top-5", 100), "eval_loss": ("loss", "loss", 1)}  # beside top-1, of summary.csv

# Settings that a card shows, under their flags' names.
RECIPE = (
    *("epochs", "batch_size", "grad_accum_steps", "opt", "lr", "lr_base", "weight_decay", "sched", "warmup_epochs"),
    *("drop_path", "aa", "mixup", "cutmix", "smoothing", "model_ema", "token_label", "seed"),
    *("clip_grad", "layer_decay", "freeze", "class_weights", "patience", "scale", "reprob", "fit_to_data"),
    *("pretrained", "initial_checkpoint"),
)
CITATIONS = {
    "arXiv:2105.14217": """@inproceedings{pan2022less,
  title={Less is More: Pay Less Attention in Vision Transformers},
  author={Pan, Zizheng and Zhuang, Bohan and He, Haoyu and Liu, Jing and Cai, Jianfei},
  booktitle={AAAI},
  year={2022}
}""",
    "arXiv:2102.12122": """@inproceedings{wang2021pyramid,
  title={Pyramid Vision Transformer: A Versatile Backbone for Dense Prediction without Convolutions},
  author={Wang, Wenhai and Xie, Enze and Li, Xiang and Fan, Deng-Ping and Song, Kaitao and Liang, Ding and Lu, Tong and
    Luo, Ping and Shao, Ling},
  booktitle={ICCV},
  year={2021}
}""",
    "arXiv:2112.10809": """@inproceedings{yang2022lite,
  title={Lite Vision Transformer with Enhanced Self-Attention},
  author={Yang, Chenglin and Wang, Yilin and Zhang, Jianming and Zhang, He and Wei, Zijun and Lin, Zhe and
    Yuille, Alan},
  booktitle={CVPR},
  year={2022}
}""",
}


def main(argv: Sequence[str] | None = None) -> int:
    """Make the folder as the command line says, and upload it if that is asked for. Returns 0."""
    parser = ArgumentParser(
        description="Make a folder of a run's best weights for the Hugging Face Hub: model.safetensors, config.json, "
        "a model card. timm loads it by create_model('local-dir:FOLDER', pretrained=True), and from the Hub by "
        "'hf-hub:OWNER/NAME'.",
        formatter_class=HelpFormatter,
        allow_abbrev=False,
    )
    add = parser.add_argument
    add("run", metavar="RUN", type=Path, help="folder of a run, output/<experiment>")
    add("folder", metavar="FOLDER", type=Path, help="folder to make")
    add("--data", metavar="NAME", help="name of the training data, for the card (the run's --dataset, or custom data)")
    add("--push", metavar="OWNER/NAME", help="upload it to this repository of the Hub (`hf auth login` first)")
    add("--private", action="store_true", help="make a new repository private")
    add("--license", default="apache-2.0", metavar="NAME", help="licence of the weights, for the card (apache-2.0)")
    add("--traceback", action="store_true", help=TRACEBACK_HELP)
    args = parser.parse_args(argv)
    if args.folder.exists() and (not args.folder.is_dir() or any(args.folder.iterdir())):
        raise InputError(f"{args.folder} is there already: name a new folder")
    try:
        args.folder.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=args.folder.parent) as temporary:  # it is there whole, or not at all
            new = Path(temporary, args.folder.name)
            make_folder(args.run, new, args.data, args.license, args.push)
            if args.folder.exists():
                args.folder.rmdir()
            new.rename(args.folder)
    except OSError as error:
        raise InputError(f"cannot make {args.folder}: {error.strerror or error}") from error
    print(f"{args.folder}: timm.create_model('local-dir:{args.folder}', pretrained=True) loads it, after import litvit")
    print(f"{args.folder / 'README.md'} says that the licence of the weights is {args.license} (--license)")
    if args.push:
        try:
            api = HfApi()
            api.create_repo(args.push, private=args.private, exist_ok=True)
            print(api.upload_folder(repo_id=args.push, folder_path=args.folder))
        except Exception as error:  # the errors of the Hub's HTTP library, whichever that is
            again = f"`hf upload {args.push} {args.folder}` tries again"
            raise InputError(f"cannot upload {args.folder} to {args.push}, {again}: {one_line(error)}") from error
    return 0


def make_folder(
    run: Path, folder: Path, data: str | None = None, licence: str = "apache-2.0", repository: str | None = None
) -> None:
    """Write a run's best weights, their configuration and a model card.

    Args:
        run: Folder of the run.
        folder: Folder to make.
        data: Name of the training data, for the card. None for the run's `dataset`.
        licence: Licence of the weights, for the card.
        repository: Name of the repository on the Hub, for the card. None for the folder's.

    Raises:
        InputError: The folder holds no run with best weights, or they are damaged.
    """
    weights, settings = run / BEST_WEIGHTS, run / SETTINGS
    if not weights.is_file() or not settings.is_file():
        raise InputError(f"{run} holds no run with best weights ({BEST_WEIGHTS}, {SETTINGS})")
    about, settings = read_description(weights), load_recipe(settings, build_parser())
    missing = [name for name in NEEDED if name not in about]
    if missing:
        raise InputError(f"{weights} is damaged or not of train.py: it does not say its {missing[0]}")
    import_modules(settings.get("imports", ()))
    config = ModelConfig(
        model=model_name(about["model"]),
        img_size=about["img_size"],
        in_chans=about["in_chans"],
        model_kwargs=about["model_kwargs"],
    )
    model = build_model(config, about["num_classes"])
    load_weights(model, weights)
    size = about["img_size"]
    data_config = {name: about[name] for name in ("mean", "std", "interpolation", "crop_pct")}
    data_config["input_size"] = (about["in_chans"], *(size if isinstance(size, list) else (size, size)))
    names = {"label_names": about["classes"]} if about.get("classes") else {}
    save_for_hf(model, folder, model_config=names, safe_serialization=True, data_config=data_config)
    shutil.copy(weights, folder / "model.safetensors")  # the same weights, with their description
    path = folder / "config.json"
    configuration = json.loads(path.read_text())
    # timm reads the number of classes from beside the arguments, and transformers refuses it among them.
    configuration["model_args"].pop("num_classes", None)
    configuration["pretrained_cfg"].pop("tag", None)  # that of the published weights
    configuration["pretrained_cfg"]["license"] = licence
    path.write_text(json.dumps(configuration, indent=2) + "\n")
    data = data or settings.get("dataset") or "custom data"
    (folder / "README.md").write_text(_card(model, about, settings, _metrics(run, about), data, licence, repository))


def _metrics(run: Path, about: dict[str, Any]) -> list[dict[str, Any]]:
    """Return the metrics of the best weights as the Hub's cards have them: top-1, and what summary.csv says beside."""
    metrics = [{"type": "accuracy", "name": "top-1", "value": round(about["top1"] / 100, 5)}]
    try:
        rows = list(csv.DictReader((run / SUMMARY).read_text().splitlines()))
        row = next((row for row in rows if float(row["eval_top1"]) == about["top1"]), {})
        for column, (kind, name, scale) in METRICS.items():
            if column in row:
                metrics.append({"type": kind, "name": name, "value": round(float(row[column]) / scale, 5)})
    except (OSError, KeyError, TypeError, ValueError):  # it is deleted or damaged
        pass
    return metrics


def _card(
    model: nn.Module,
    about: dict[str, Any],
    settings: dict[str, Any],
    metrics: list[dict[str, Any]],
    data: str,
    licence: str,
    repository: str | None,
) -> str:
    """Return a model card in Markdown, with the header that the Hub reads."""
    name, size = about["model"], about["img_size"]
    pixels = " x ".join(map(str, size if isinstance(size, list) else (size, size)))
    numel = sum(map(torch.numel, model.parameters()))
    result = {
        "task": {"type": "image-classification"},
        "dataset": {"name": data, "type": data},
        "metrics": metrics,
    }
    header = {
        "library_name": "timm",
        "pipeline_tag": "image-classification",
        "tags": ["image-classification", "timm", "litvit"],
        "license": licence,
        "model-index": [{"name": repository or name, "results": [result]}],
    }
    shown = {key: settings[key] for key in RECIPE if settings.get(key) not in (None, False)}
    if "lr" in shown:
        shown.pop("lr_base", None)  # it is not in effect
    recipe = "\n".join(f"| `{key}` | {value} |" for key, value in shown.items())
    measured = "\n".join(f"| {metric['name']} | {metric['value']} |" for metric in metrics)
    modules = [*(["litvit"] if isinstance(model, Backbone) else []), *settings.get("imports", ())]
    imports = "".join(f"import {module}  # registers the model with timm\n" for module in modules)
    papers = getattr(get_pretrained_cfg(name), "paper_ids", None) or ""
    citation = CITATIONS.get(papers) if isinstance(papers, str) else None
    source = f"hf-hub:{repository}" if repository else "local-dir:FOLDER"
    parts = [
        f"---\n{yaml.safe_dump(header, sort_keys=False)}---",
        f"# {name}, trained on {data}",
        f"{about['num_classes']} classes, {numel / 1e6:.1f} M parameters, images of {pixels} pixels. On the validation "
        f"images, after epoch {about['epoch']}:\n\n| metric | value |\n| -- | -- |\n{measured}",
        f"## Use\n\n```python\n{imports}import timm\nfrom PIL import Image\n\n"
        f'model = timm.create_model("{source}", pretrained=True).eval()\n'
        "transform = timm.data.create_transform(**timm.data.resolve_model_data_config(model))\n"
        'image = Image.open("image.jpg").convert("RGB")\n'
        "probabilities = model(transform(image).unsqueeze(0)).softmax(1)\n```",
        f"## Recipe\n\nThe settings of the run that differ from off:\n\n| setting | value |\n| -- | -- |\n{recipe}",
        f"## Licence\n\nThe weights are under the licence `{licence}`.",
        f"## Citation\n\n```bibtex\n{citation}\n```" if citation else "",
    ]
    return "\n\n".join(filter(None, parts)) + "\n"
