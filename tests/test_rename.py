"""The strict loading engine against planted mistakes: in the table, in the checkpoint, in the file."""

import weakref

import pytest
import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from tests.published import published
from unifashion import UserError
from unifashion.config import FULL
from unifashion.vae import VAE
from weights import vae
from weights.rename import Table, load_into, rename, under

TABLE: Table = {
    "stem.*": "0.*",
    "blocks.#.norm.*": "1.#.*",
    "blocks.9.*": None,  # one block more than we use
    "head.*": None,
}


# names


def test_layer_numbers_and_the_rest_of_a_name_are_carried_over():
    table: Table = {"down.#.block.#.conv.*": "levels.#.blocks.#.c.*", "temp": "t"}
    names = ["down.0.block.12.conv.weight", "down.3.block.0.conv.a.b", "temp"]
    ours = rename({name: torch.tensor(i) for i, name in enumerate(names)}, table)
    assert ours == {"levels.0.blocks.12.c.weight": 0, "levels.3.blocks.0.c.a.b": 1, "t": 2}


def test_dots_and_hashes_mean_no_more_than_they_say():
    for name in ("blocksx0.w", "blocks.a.w", "blocks.0.1.w", "xblocks.0.w", "blocks.0.wx"):
        with pytest.raises(UserError, match="no row of the table names it"):
            rename({name: torch.ones(1)}, {"blocks.#.w": "w.#"})


def test_a_sub_table_stands_behind_its_prefixes():
    rows: Table = {"a.*": "x.*", "b": None}
    assert under("net.#.", "ours.#.", rows) == {"net.#.a.*": "ours.#.x.*", "net.#.b": None}


def test_what_is_left_out_may_be_there_or_not():
    module = network()
    load_into(module, checkpoint(), TABLE)
    load_into(
        module, checkpoint() | {"blocks.9.norm.weight": torch.ones(5), "head.bias": torch.ones(7)}, TABLE
    )


@pytest.mark.parametrize(
    ("table", "file", "message"),
    [
        (TABLE, {"stray.weight": 3}, r"^stray\.weight: no row of the table names it$"),
        (TABLE | {"stem.bias": "0.bias"}, {}, r"^stem\.bias: the rows stem\.\* and stem\.bias all name it$"),
        (TABLE | {"tail.*": "2.*"}, {}, r"^tail\.\*: nothing in the checkpoint has the name of this row$"),
        (TABLE | {"twin.weight": "0.weight"}, {"twin.weight": 3}, r"^stem\.weight and twin\.weight would both become 0\.weight$"),
        (TABLE, {"stem.bias": None}, r"^the checkpoint lacks stem\.bias, for 0\.bias \(3,\)$"),
        (TABLE, {"stem.bias": 4}, r"^stem\.bias: shape \(4,\) in the file, \(3,\) in the model \(0\.bias\)$"),
        (TABLE, {"blocks.2.norm.weight": 5, "blocks.2.norm.bias": 5}, r"^blocks\.2\.norm\.weight: the model has no such layer \(and 1 more like it\)$"),
    ],
    ids=["unknown name", "two rows", "dead row", "doubled target", "missing", "shape", "too deep"],
)  # fmt: skip
def test_a_mistake_is_one_line_that_names_the_tensor(table: Table, file: dict[str, int | None], message: str):
    """file: name -> its size, or None where it is taken out of the right checkpoint."""
    wrong = checkpoint()
    for name, size in file.items():
        wrong.pop(name, None)
        if size is not None:
            wrong[name] = torch.ones(size)
    module = network()
    before = {name: tensor.clone() for name, tensor in module.state_dict().items()}
    with pytest.raises(UserError, match=message):
        load_into(module, wrong, table)
    assert all(torch.equal(before[name], tensor) for name, tensor in module.state_dict().items())


# tensors


def test_every_tensor_arrives_and_the_checkpoint_is_unchanged():
    module, file = network(), checkpoint()
    before = {name: tensor.clone() for name, tensor in file.items()}
    load_into(module, file, TABLE)
    assert torch.equal(module[0].weight, before["stem.weight"])
    assert torch.equal(module[1][1].bias, before["blocks.1.norm.bias"])
    assert file.keys() == before.keys() and all(torch.equal(file[name], before[name]) for name in file)


def test_what_needs_no_cast_is_taken_over_and_not_copied():
    module, file = network(), checkpoint()
    load_into(module, file, TABLE)
    assert module[0].weight.data_ptr() == file["stem.weight"].data_ptr()
    load_into(module, file, TABLE, dtype=torch.float64)
    assert module[0].weight.data_ptr() != file["stem.weight"].data_ptr()


def test_a_module_on_the_meta_device_is_filled():
    with torch.device("meta"):
        module = network()
    load_into(module, checkpoint(), TABLE)
    assert all(isinstance(p, nn.Parameter) and p.device.type == "cpu" for p in module.parameters())
    assert torch.isfinite(module(torch.ones(2, 4))).all()


def test_floating_tensors_take_the_modules_type_or_the_one_asked_for():
    module = network()
    module.register_buffer("count", torch.tensor(0))
    file, table = checkpoint() | {"n": torch.tensor(7)}, TABLE | {"n": "count"}
    load_into(
        module, {name: tensor.half() if tensor.ndim else tensor for name, tensor in file.items()}, table
    )
    assert {p.dtype for p in module.parameters()} == {torch.float32}
    load_into(module, file, table, dtype=torch.bfloat16)
    assert {p.dtype for p in module.parameters()} == {torch.bfloat16}
    assert module.count.dtype == torch.int64 and module.count == 7


@pytest.mark.parametrize("dtype", [torch.int8, torch.bool, torch.complex64], ids=str)
def test_a_quantised_copy_is_refused(dtype: torch.dtype):
    file = checkpoint()
    name = next(name for name, tensor in file.items() if tensor.is_floating_point())
    with pytest.raises(UserError, match=rf"^{name}: {dtype} in the file, torch.float32 in the model$"):
        load_into(network(), file | {name: file[name].to(dtype)}, TABLE)


def test_frozen_parameters_stay_frozen():
    module = network().requires_grad_(False)
    module[0].requires_grad_(True)
    load_into(module, checkpoint(), TABLE)
    assert [p.requires_grad for p in module.parameters()] == [True, True, False, False, False, False]


def test_originals_are_freed_one_by_one_as_they_are_cast():
    alive: list[weakref.ref] = []
    seen: list[int] = []

    class Watch(TorchFunctionMode):
        def __torch_function__(self, func, types, args=(), kwargs=None):
            if func is Tensor.to:
                seen.append(sum(ref() is not None for ref in alive))
            return func(*args, **(kwargs or {}))

    def read() -> dict[str, Tensor]:
        file = checkpoint()
        alive.extend(weakref.ref(tensor) for tensor in file.values())
        return file

    with Watch():
        load_into(network(), read(), TABLE, dtype=torch.float64)
    assert seen == [6, 5, 4, 3, 2, 1]


def test_of_two_rows_that_could_have_given_it_the_missing_one_is_named_where_its_sibling_is():
    table: Table = {"up.#.1.conv.*": "#.*", "up.#.2.conv.*": "#.*"}
    file = {f"up.0.1.conv.{name}": torch.ones(3) for name in ("weight", "bias")}
    file["up.1.2.conv.bias"] = torch.ones(3)
    with pytest.raises(
        UserError, match=r"^the checkpoint lacks up\.1\.2\.conv\.weight, for 1\.weight \(3,\)$"
    ):
        load_into(nn.Sequential(nn.LayerNorm(3), nn.LayerNorm(3)), file, table)


def test_one_file_fills_several_modules():
    parts = nn.ModuleDict({"unet": nn.Linear(2, 3), "vae": nn.Linear(4, 5)})
    file = {"model.weight": torch.ones(3, 2), "model.bias": torch.ones(3), "first_stage.weight": torch.ones(5, 4),
            "first_stage.bias": torch.ones(5), "logvar": torch.ones(1000)}  # fmt: skip
    rows: Table = {"*": "*"}
    table = under("model.", "unet.", rows) | under("first_stage.", "vae.", rows) | {"logvar": None}
    load_into(parts, file, table)
    assert parts["unet"].weight.sum() == 6 and parts["vae"].weight.sum() == 20
    with pytest.raises(UserError, match=r"^first_stage\.weight: no row"):
        load_into(parts, file, {row: ours for row, ours in table.items() if "first_stage" not in row})


def test_a_prefix_stands_before_every_name_of_the_file():
    with torch.device("meta"):
        model = VAE(FULL.vae)
    file = {
        f"first_stage_model.{name}": tensor
        for name, tensor in published("stableviton_VITONHD_VAE_finetuning").items()
    }
    load_into(model, file, under("first_stage_model.", "", vae.VAE))
    with pytest.raises(UserError, match="no row of the table names it"):
        load_into(model, file, vae.VAE)


# helpers


def network() -> nn.Sequential:
    return nn.Sequential(nn.Linear(4, 3), nn.Sequential(nn.LayerNorm(3), nn.LayerNorm(3)))


def checkpoint() -> dict[str, Tensor]:
    shapes = {"stem.weight": (3, 4), "stem.bias": (3,)}
    shapes |= {f"blocks.{i}.norm.{name}": (3,) for i in range(2) for name in ("weight", "bias")}
    generator = torch.Generator().manual_seed(0)
    return {name: torch.randn(shape, generator=generator) for name, shape in shapes.items()}
