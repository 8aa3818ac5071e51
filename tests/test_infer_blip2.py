"""`infer.py index` and `search` with BLIP-2 as published, from each of its layouts, before any training of ours."""

import json
import shlex
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file
from torch import Tensor

import infer
from tests.rooms import photo
from tests.test_layouts import hugging_face_blip2
from tests.test_load import SMALL, folder, original, originals, source  # noqa: F401 - fixtures
from unifashion.model import UniFashion
from unifashion.preprocess import qformer_image, read_image
from unifashion.search import image_embeddings
from unifashion.tokenizers import WordPiece, build_vocab
from weights import convert
from weights.load import load_public
from weights.qformer import QFORMER
from weights.vit import VIT

BLIP2 = ("eva_vit_g.pth", "blip2_pretrained.pth")


@pytest.fixture
def room(folder: Path, monkeypatch: pytest.MonkeyPatch) -> Path:  # noqa: F811
    """Where there are photos, and in `files` what a user of search alone gets: BLIP-2 and its vocabulary."""
    words = build_vocab(["a red dress with long sleeves"])
    words += [f"[unused{i}]" for i in range(SMALL.qformer.vocab_size - 1 - len(words))]
    (folder / "bert_vocab.txt").write_text("\n".join(words) + "\n")
    assert len(WordPiece(folder / "bert_vocab.txt")) == SMALL.qformer.vocab_size
    (folder / "VITONHD_PBE_pose.ckpt").unlink()
    room = folder.parent
    (room / "shop").mkdir()
    for i, name in enumerate("abc"):
        photo(room / "shop" / f"{name}.png", (40, 50), i)
    monkeypatch.chdir(room)
    return room


def blip2(capsys: pytest.CaptureFixture, *words: str) -> dict:
    assert infer.main([*words, "--model", "blip2", "--weights", "files", "--json"]) == 0
    return json.loads(capsys.readouterr().out)


def test_a_folder_is_searched_by_text_and_by_photo_with_public_files_alone(room: Path, capsys):
    made = blip2(capsys, "index", "--images", "shop", "--out", "cat")
    assert (made["pictures"], made["preset"]) == (3, "full")
    found = blip2(capsys, "search", "--catalog", "cat", "--text", "a red dress")["found"]
    assert [one["rank"] for one in found] == [1, 2, 3]
    for name in "abc":
        first, *_ = blip2(capsys, "search", "--catalog", "cat", "--image", f"shop/{name}.png")["found"]
        assert first["path"] == f"{name}.png" and first["score"] > 0.999
    changed = blip2(capsys, "search", "--catalog", "cat", "--image", "shop/a.png", "--text", "red")
    assert any("BLIP-2 was not trained" in note for note in changed["notes"])


def test_what_is_indexed_is_what_blip2_says_of_the_picture(room: Path, capsys, source: UniFashion):  # noqa: F811
    model = load_public("full", room / "files", draws=False)
    for part in ("vit", "qformer"):
        wanted = getattr(source, part).state_dict()
        assert all(torch.equal(x, wanted[k]) for k, x in getattr(model, part).state_dict().items())
    blip2(capsys, "index", "--images", "shop", "--out", "cat")
    rows = infer_catalog(room / "cat")
    for i, name in enumerate("abc"):
        path = room / "shop" / f"{name}.png"
        seen = image_embeddings(model, squashed(path)[None])[0].detach()
        padded = image_embeddings(model, qformer_image(read_image(path), SMALL.vit.image_size[0])[None])[0]
        assert (rows[i] - seen).abs().max() < 1e-3 < 0.05 < (rows[i] - padded).abs().max()


def squashed(path: Path) -> Tensor:
    """As LAVIS' blip_image_eval: bicubic to a square, whatever the shape; CLIP's mean and deviation."""
    side = SMALL.vit.image_size[0]
    pixels = np.array(Image.open(path).convert("RGB").resize((side, side), Image.Resampling.BICUBIC)) / 255
    mean, deviation = [0.48145466, 0.4578275, 0.40821073], [0.26862954, 0.26130258, 0.27577711]
    return torch.from_numpy((pixels - mean) / deviation).permute(2, 0, 1).float()


def infer_catalog(folder: Path) -> Tensor:  # noqa: F811
    from unifashion.catalog import Catalog

    return Catalog(folder).images


LAYOUTS = ("Hugging Face", "UniFashion's own", "converted")


@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_layout_makes_the_same_catalogue(room: Path, capsys, source: UniFashion, layout: str):  # noqa: F811
    blip2(capsys, "index", "--images", "shop", "--out", "cat")
    files = room / "files"
    whole = {f"visual_encoder.{k}": x for k, x in original(source.vit.state_dict(), VIT).items()}
    whole |= original(source.qformer.state_dict(), QFORMER)
    if layout == "Hugging Face":
        (files / "blip2-itm-vit-g").mkdir()
        save_file(hugging_face_blip2(whole), files / "blip2-itm-vit-g/model.safetensors")
    elif layout == "UniFashion's own":
        whole |= {"query_proj.weight": torch.ones(2), "prompt_tokens": torch.ones(3)}
        torch.save({"epoch": 3, "Blip2QformerCirRerank": whole}, files / "tuned_clip_best.pt")
    else:
        assert convert.main([str(files / name) for name in BLIP2]) == 0
        capsys.readouterr()
    for name in BLIP2:
        (files / name).unlink()
    blip2(capsys, "index", "--images", "shop", "--out", "other")
    assert torch.equal(infer_catalog(room / "cat"), infer_catalog(room / "other"))
    # The temperature, which the port lacks, is a part of the model and of its hash, though of no rank.
    if layout != "Hugging Face":
        assert blip2(capsys, "search", "--catalog", "cat", "--text", "red")["pictures"] == 3


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("index --images shop --out cat --model blip2 --captions", "--model blip2 writes no --captions"),
        ("index --images shop --out cat --model blip2 --preset tiny", "--model blip2 has no preset tiny"),
        ("index --images shop --out cat --model blip2 --weights none", "none: there is no such folder of weights"),
        ("index --images shop --out cat --model blip2 --weights shop", "shop/bert_vocab.txt is missing: get vocab.txt"),
        ("index --images shop --out cat --model blip3", "invalid choice: 'blip3'"),
        ("index --images shop --out cat --preset full --weights files", "files/unifashion/model.safetensors is missing"),
    ],
)  # fmt: skip
def test_bad_input_is_one_line_that_says_what(room: Path, capsys, line: str, message: str):
    refused(capsys, line, message)
    assert not (room / "cat").exists()


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda path: path.write_bytes(path.read_bytes()[:-200]), "is damaged, cut short, or not a checkpoint"),
        (lambda path: path.write_bytes(b""), "is empty: the download did not begin"),
        (lambda path: path.write_text("<!DOCTYPE html><html>"), "is a web page, not a checkpoint"),
        (lambda path: path.write_text("version https://git-lfs.github.com/spec/v1\n"), "is a git-lfs pointer"),
        (lambda path: torch.save({"model": {"a": Harmless()}}, path), "refused, its pickle asks for tests.test_infer_blip2.Harmless"),
        (lambda path: torch.save({"model": {"a": torch.ones(1)}}, path), "its names (a, ...) are of no layout that is known here"),
    ],
    ids=["cut short", "empty", "a page", "git-lfs", "another program", "another network"],
)  # fmt: skip
@pytest.mark.parametrize("name", BLIP2)
def test_a_file_that_is_not_what_it_is_named_is_one_line(room: Path, capsys, name: str, spoil, message: str):
    spoil(room / "files" / name)
    line = "index --images shop --out cat --model blip2 --weights files --quiet"
    refused(capsys, line, message.removeprefix("is damaged, "))
    assert not [*(room / "cat").glob("*.safetensors")]


class Harmless:
    pass


def test_a_catalogue_of_blip2_is_not_searched_with_another_model(room: Path, capsys):
    blip2(capsys, "index", "--images", "shop", "--out", "cat")
    refused(
        capsys, "search --catalog cat --text red --preset tiny", "cat was made with preset full, not tiny"
    )


def refused(capsys: pytest.CaptureFixture, line: str, message: str) -> None:
    capsys.readouterr()
    assert infer.main(shlex.split(line)) == 2
    told = capsys.readouterr()
    assert told.out == "" and told.err.startswith("infer.py: ") and message in told.err
    assert told.err.count("\n") == 1
