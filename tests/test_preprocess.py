"""Preprocessing against the official UniFashion and StableVITON loaders (golden pixels); files, masks and pasting by claim."""

import struct
import warnings
import zlib

import numpy as np
import pytest
import torch
from PIL import Image
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

from tests.faults import plant
from tests.goldens import load
from unifashion import UserError, preprocess
from unifashion.preprocess import (
    CLIP_MEAN,
    CLIP_STD,
    TORSO_BOX,
    check_png_path,
    crop_back,
    keep_mask,
    latent_mask,
    llava_image,
    mask_from_box,
    mask_from_file,
    pad_to_ratio,
    paste,
    qformer_image,
    read_image,
    save_png,
    to_uint8,
    torso_mask,
    unet_image,
)

TARGETPAD, STABLEVITON = load("preprocess_targetpad"), load("preprocess_stableviton")


# The originals


@pytest.mark.parametrize("name", ["portrait", "landscape", "square", "mild", "grey"])
def test_qformer_image_equals_the_official_targetpad_transform(name):
    pixels = qformer_image(picture(TARGETPAD.inputs[name]), ratio=1.25, fill=0)
    levels = ((pixels * CLIP_STD + CLIP_MEAN) * 255).round().to(torch.uint8)
    assert (levels != TARGETPAD.outputs[f"{name}_u8"]).sum() == 0
    if name in TARGETPAD.outputs:
        close(pixels, TARGETPAD.outputs[name], 1e-6)
    else:
        close(pixels[:, ::3, ::3], TARGETPAD.outputs[f"{name}_s"], 1e-6)


def test_odd_sizes_are_cut_to_whole_pixels_as_in_the_official_code():
    image = noise((78, 102))
    canvas = Image.new("RGB", (80, 102))
    canvas.paste(image, (1, 0))  # (102 / 1.25 - 78) / 2 = 1.8
    resized = canvas.resize((224, 285), Image.Resampling.BICUBIC)  # 224 * 102 / 80 = 285.6
    expected = np.array(resized)[30 : 30 + 224]  # Python rounds (285 - 224) / 2 = 30.5 to the even 30
    levels = (qformer_image(image, ratio=1.25, fill=0) * CLIP_STD + CLIP_MEAN) * 255
    assert np.array_equal(levels.round().permute(1, 2, 0).numpy(), expected)


@pytest.mark.parametrize("sample", [0, 1, 2])  # twice the size, 1.6 times, enlarged
@pytest.mark.parametrize("name", ["agn", "cloth", "image", "image_densepose"])
def test_unet_image_equals_stablevitons_to_the_level(name, sample):
    pixels = unet_image(picture(STABLEVITON.inputs[f"{name}_{sample}"]), tuple(STABLEVITON.config["size"]))
    close(pixels, STABLEVITON.outputs[f"{name}_{sample}"].permute(2, 0, 1), 1e-6)


@pytest.mark.parametrize("sample", ["0", "1", "2", "full"])
def test_keep_mask_and_its_latent_equal_stablevitons(sample):
    size = tuple(STABLEVITON.config["full" if sample == "full" else "size"])
    keep = keep_mask(picture(STABLEVITON.inputs[f"agn_mask_{sample}"]), size)
    if sample == "full":
        close(keep[:, ::8], STABLEVITON.outputs["full_agn_mask_r8"].permute(2, 0, 1), 1e-6)
    else:
        close(keep, STABLEVITON.outputs[f"agn_mask_{sample}"].permute(2, 0, 1), 1e-6)
    close(latent_mask(keep, 8), STABLEVITON.outputs[f"mask_latent_{sample}"], 1e-6)


@pytest.mark.parametrize("size", [(90, 160), (161, 90), (640, 427), (500, 500), (336, 336), (3, 700)])
def test_llava_image_equals_transformers_on_the_picture_padded_with_clips_mean_colour(size):
    llava_equals(size)


def llava_equals(size):
    image = noise(size)
    side = max(size)
    square = Image.new(
        "RGB", (side, side), (122, 116, 104)
    )  # its mean, 0.48145466, 0.4578275, 0.40821073, in levels
    square.paste(image, ((side - size[0]) // 2, (side - size[1]) // 2))
    whole = {"shortest_edge": 336}, {"height": 336, "width": 336}
    theirs = CLIPImageProcessorPil(size=whole[0], crop_size=whole[1])(square, return_tensors="pt")
    close(preprocess.llava_image(image), theirs["pixel_values"][0], 1e-5)


def test_llavas_padding_is_nothing_to_it_but_for_the_rounding():
    pixels = llava_image(noise((100, 300)))
    assert pixels.shape == (3, 336, 336) and pixels[:, :, :100].abs().max() < 0.02 < pixels[:, :, 150].std()


def test_a_panorama_is_made_smaller_before_it_is_padded_for_llava():
    pixels = llava_image(Image.new("RGB", (60_000, 40), "red"))
    assert pixels.shape == (3, 336, 336)


@pytest.mark.parametrize("sample", [0, 1, 2])
def test_what_stablevitons_clip_reads_is_the_pixels_of_its_vae_squashed(sample):
    pixels = unet_image(picture(STABLEVITON.inputs[f"cloth_{sample}"]), tuple(STABLEVITON.config["size"]))
    golden = STABLEVITON.outputs[f"clip_input_{sample}"]
    close(preprocess.squashed_pixels(pixels)[:, ::4, ::4], golden, 1e-5)
    # The golden's are enlarged, those of 512x384 are not: then two pixels of four are read, on either side.
    ends = torch.ones(3, 16, 16)
    ends[:, 1::4] = ends[:, 2::4] = -1
    squashed = preprocess.squashed_pixels(ends, 4)
    close(squashed, ((0 - CLIP_MEAN) / CLIP_STD).expand_as(squashed), 1e-6)


def test_what_paint_by_examples_clip_reads_is_the_whole_picture_squashed_bicubic():
    image = Image.effect_noise((90, 61), 90).convert("RGB")
    levels = (preprocess.squashed_image(image, 20) * CLIP_STD + CLIP_MEAN) * 255
    expected = np.array(image.resize((20, 20), Image.Resampling.BICUBIC))
    assert np.array_equal(levels.round().permute(1, 2, 0).numpy(), expected)


FAULTS = {
    "no rounding in the resizing": ("_resize", "+ 2 >> 2", ">> 2"),
    "pixel corners for pixel centres": ("_neighbours", "+ 0.5) * (source / target) - 0.5", "* (source / target))"),
    "a mask cut at 127": ("_binary", "level >= 128", "level > 126"),
    "an antialiased latent mask": ("latent_mask", 'size, mode="bilinear"', 'size, antialias=True, mode="bilinear"'),
    "antialiased pixels for CLIP": ("squashed_pixels", '(size, size), mode="bilinear"', '(size, size), antialias=True, mode="bilinear"'),
    "pixels for CLIP in [-1,1]": ("squashed_pixels", "((pixels + 1) / 2 - CLIP_MEAN)", "(pixels - CLIP_MEAN)"),
    "white padding": ("qformer_image", "fill=(fill, fill, fill)", "fill=(255, 255, 255)"),
    "bilinear for bicubic": ("_middle", "size * side // short for side in image.size), Image.Resampling.BICUBIC",
                             "size * side // short for side in image.size), Image.Resampling.BILINEAR"),
    "the green mean for the red": ("CLIP_MEAN", "0.48145466, 0.4578275", "0.4578275, 0.48145466"),
}  # fmt: skip


@pytest.mark.parametrize("fault", FAULTS)
def test_parity_notices(fault, monkeypatch):
    everything_equals()
    plant(monkeypatch, preprocess, *FAULTS[fault])
    with pytest.raises(AssertionError):
        everything_equals()


@pytest.mark.parametrize(
    ("target", "old", "new"),
    [
        ("llava_image", "int(255 * level)", "round(255 * level)"),
        ("llava_image", "pad_to_ratio(_bounded(image), 1, mean)", "pad_to_ratio(_bounded(image), 1, 255)"),
        ("llava_image", "square, _ = pad_to_ratio(_bounded(image), 1, mean)", "square = image"),  # CLIP's own
        ("pad_to_ratio", "x, y = (width - image.width) // 2,", "x, y = 0,"),
        FAULTS["bilinear for bicubic"],
    ],
)
def test_llavas_parity_notices(target, old, new, monkeypatch):
    plant(monkeypatch, preprocess, target, old, new)
    with pytest.raises(AssertionError):
        llava_equals((90, 160))


def everything_equals():
    for name in ("portrait", "mild"):
        ours = preprocess.qformer_image(picture(TARGETPAD.inputs[name]), ratio=1.25, fill=0)
        close(ours[:, ::3, ::3], qformer_golden(name), 1e-6)
    size = tuple(STABLEVITON.config["size"])
    for sample in range(3):
        test_unet_image_equals_stablevitons_to_the_level("cloth", sample)
        test_what_stablevitons_clip_reads_is_the_pixels_of_its_vae_squashed(sample)
        grey = picture(STABLEVITON.inputs[f"agn_mask_{sample}"])
        close(keep_mask(grey, size), STABLEVITON.outputs[f"agn_mask_{sample}"].permute(2, 0, 1), 1e-6)
        latent = preprocess.latent_mask(keep_mask(grey, size), 8)
        close(latent, STABLEVITON.outputs[f"mask_latent_{sample}"], 1e-6)
    steps = np.arange(120, 136, dtype=np.uint8).reshape(4, 4)  # no golden mask has levels near 128
    assert set(keep_mask(Image.fromarray(steps), (4, 4)).flatten()[:8].tolist()) == {1.0}


def qformer_golden(name):
    return (
        TARGETPAD.outputs[name][:, ::3, ::3] if name in TARGETPAD.outputs else TARGETPAD.outputs[f"{name}_s"]
    )


# Ours


@pytest.mark.parametrize("name", ["photo.jpg", "photo.png", "photo.webp"])
def test_a_sound_picture_with_damaged_exif_is_read(name, tmp_path):
    noise((40, 30)).save(tmp_path / name, exif=b"Exif\x00\x00no such thing")
    assert read_image(tmp_path / name).size == (40, 30)


@pytest.mark.parametrize("size", [(60, 180), (180, 60)])
def test_our_qformer_image_shows_the_whole_garment_on_white(size):
    image = Image.new("RGB", size, "red")
    levels = (qformer_image(image) * CLIP_STD + CLIP_MEAN).mul(255).round()
    red = (levels == torch.tensor([255.0, 0, 0]).view(3, 1, 1)).all(0)
    white = (levels == 255).all(0)
    along, across = (0, 1) if size[1] > size[0] else (1, 0)
    assert red.any(dim=across).all()  # red from the first row to the last: nothing of the long side is cut
    assert 0.32 < red.float().mean() < 0.34 and 0.64 < white.float().mean() < 0.67
    assert white.all(dim=along)[:70].all() and white.all(dim=along)[-70:].all()


def test_a_panorama_is_shrunk_before_it_is_padded_to_a_square(monkeypatch):
    monkeypatch.setattr(
        "unifashion.preprocess.ImageOps.expand", lambda image, *_, **__: image.crop((0, 0, 9, 9))
    )
    sizes = []
    monkeypatch.setattr(
        Image.Image, "crop", lambda image, box: sizes.append(image.size) or Image.new("RGB", (224, 224))
    )
    assert qformer_image(Image.new("RGB", (100_000, 1), "red")).shape == (3, 224, 224)
    assert sizes[0] == (8192, 1)  # padding what is 100,000 long would take 30 GB


def test_the_callers_picture_is_not_changed():
    image = Image.new("RGB", (9000, 10), "red")
    qformer_image(image)
    assert image.size == (9000, 10)


def test_beyond_half_size_every_pixel_counts():
    lines = np.zeros((90, 90, 3), np.uint8)
    lines[:, ::3] = 255  # a fine stripe: one pixel in three is white, so the picture is a third grey
    pixels = unet_image(Image.fromarray(lines), (30, 30))
    assert (pixels + 1 / 3)[..., 1:-1].abs().max() < 0.02  # without antialiasing it would be all black: -1
    keep = keep_mask(Image.fromarray(lines[..., 0]), (30, 30))
    assert (keep - 2 / 3)[..., 1:-1].abs().max() < 0.02


@pytest.mark.parametrize("size", [(300, 200), (200, 300), (90, 120), (91, 120), (1, 1)])
def test_padding_is_centred_to_three_by_four_and_undone_to_the_pixel(size):
    image = noise(size)
    canvas, box = pad_to_ratio(image, fill=7)
    assert abs(canvas.width - canvas.height * 3 / 4) <= 1
    assert abs(box[0] - (canvas.width - box[2])) <= 1 and abs(box[1] - (canvas.height - box[3])) <= 1
    padding = np.array(canvas).astype(int)
    padding[box[1] : box[3], box[0] : box[2]] = 7
    assert (padding == 7).all()
    assert np.array_equal(crop_back(canvas, box, canvas.size), image)
    mask, mask_box = pad_to_ratio(image.convert("L"), fill=0)
    assert mask.mode == "L" and mask.size == canvas.size and mask_box == box


@pytest.mark.parametrize("size", [(300, 170), (130, 400)])
def test_positions_survive_a_network_that_works_at_its_own_size(size):
    y, x = np.mgrid[: size[1], : size[0]]
    image = Image.fromarray(np.stack([x * 255 / size[0], y * 255 / size[1], 0 * x], -1).astype(np.uint8))
    canvas, box = pad_to_ratio(image)
    back = crop_back(canvas.resize((48, 64), Image.Resampling.BICUBIC), box, canvas.size)
    assert back.size == size
    difference = (np.array(back).astype(float) - np.array(image))[24:-24, 24:-24]
    assert np.abs(difference).max() <= 2  # smooth again, not blocks of one network pixel
    assert np.abs(difference.mean((0, 1))).max() < 0.1  # a shift of half a pixel makes it 0.3 to 0.9


def test_a_hair_thin_strip_is_refused(monkeypatch):
    monkeypatch.setattr("unifashion.preprocess.MAX_PIXELS", 1000)
    assert pad_to_ratio(Image.new("RGB", (50, 1)))[0].size == (50, 67)
    with pytest.raises(UserError, match="100x1 pixels is too long and thin"):
        pad_to_ratio(Image.new("RGB", (100, 1)))


def test_to_uint8_undoes_the_scaling_of_every_level_and_clamps():
    levels = np.arange(256, dtype=np.uint8).reshape(16, 16, 1).repeat(3, 2)
    assert np.array_equal(to_uint8(unet_image(Image.fromarray(levels), (16, 16))), levels)
    assert to_uint8(torch.tensor([-1.5, 0.0, 1.5]).view(3, 1, 1)).tolist() == [[[0, 128, 255]]]


# Masks and pasting


def test_pasting_leaves_the_pixels_outside_the_mask_bit_for_bit_through_the_png(tmp_path):
    person, generated = np.array(noise((40, 60))), np.array(noise((40, 60), seed=1))
    mask = np.array(mask_from_box((5, 7, 20, 30), (40, 60)))
    save_png(Image.fromarray(paste(person, generated, mask)), tmp_path / "out.png")
    result = np.array(Image.open(tmp_path / "out.png"))
    inside = np.zeros((60, 40), bool)
    inside[7:30, 5:20] = True
    assert np.array_equal(result[~inside], person[~inside])
    assert np.array_equal(result[inside], generated[inside])


def test_a_soft_mask_edge_belongs_to_the_person():
    person, generated = np.zeros((1, 3, 3), np.uint8), np.full((1, 3, 3), 9, np.uint8)
    assert paste(person, generated, np.array([[0, 254, 255]], np.uint8))[0, :, 0].tolist() == [0, 0, 9]


def test_pasting_refuses_pictures_of_different_sizes():
    with pytest.raises(ValueError, match="shapes differ"):
        paste(np.zeros((4, 4, 3), np.uint8), np.zeros((1, 4, 3), np.uint8), np.zeros((4, 4), np.uint8))


@pytest.mark.parametrize(
    "box", [(-1, 0, 5, 5), (0, -1, 5, 5), (0, 0, 41, 5), (0, 0, 5, 61), (50, 70, 60, 80)]
)
def test_a_box_outside_the_picture_is_refused(box):
    with pytest.raises(UserError, match="not inside the picture of 40x60"):
        mask_from_box(box, (40, 60))


@pytest.mark.parametrize("box", [(5, 5, 5, 9), (9, 5, 5, 9), (5, 9, 9, 5)])
def test_an_inverted_box_is_refused(box):
    with pytest.raises(UserError, match="is empty"):
        mask_from_box(box, (40, 60))


def test_a_box_of_the_whole_picture_is_refused():
    with pytest.raises(UserError, match="nothing of the person"):
        mask_from_box((0, 0, 40, 60), (40, 60))


def test_the_torso_mask_is_the_torso_box():
    mask = np.array(torso_mask((200, 100))) == 255
    y, x = np.nonzero(mask)
    assert (x.min() / 200, y.min() / 100, (x.max() + 1) / 200, (y.max() + 1) / 100) == TORSO_BOX
    assert mask.sum() == (x.max() - x.min() + 1) * (y.max() - y.min() + 1)


def test_a_mask_file_of_another_size_is_resized_to_a_hard_mask(tmp_path):
    small = Image.new("L", (30, 40), 0)
    small.paste(200, (10, 10, 20, 30))  # light grey counts as white
    small.paste(100, (0, 0, 5, 5))  # dark grey as black
    small.save(tmp_path / "mask.png")
    for size in ((30, 40), (300, 400), (303, 400)):  # 1 % off is accepted
        mask = np.array(mask_from_file(tmp_path / "mask.png", size))
        assert mask.shape == size[::-1] and set(np.unique(mask)) == {0, 255}
        assert abs((mask == 255).mean() - 1 / 6) < 0.01 and mask[0, 0] == 0


def test_a_mask_of_another_aspect_ratio_is_refused(tmp_path):
    mask_from_box((1, 1, 9, 9), (100, 100)).save(tmp_path / "mask.png")
    for size in ((103, 100), (100, 103)):
        with pytest.raises(UserError, match=r"mask.png: a mask of 100x100 does not fit"):
            mask_from_file(tmp_path / "mask.png", size)


@pytest.mark.parametrize(
    ("level", "message"), [(0, "nothing to repaint"), (127, "nothing to repaint"), (255, "nothing of")]
)
def test_an_empty_or_full_mask_is_refused(tmp_path, level, message):
    Image.new("L", (20, 20), level).save(tmp_path / "mask.png")
    with pytest.raises(UserError, match=rf"mask\.png: the mask .*{message}"):
        mask_from_file(tmp_path / "mask.png", (20, 20))


def test_white_strokes_on_a_transparent_layer_are_a_mask(tmp_path):
    layer = Image.new("RGBA", (20, 20), (0, 0, 0, 0))
    layer.paste("white", (5, 5, 10, 10))
    layer.save(tmp_path / "mask.png")
    assert (np.array(mask_from_file(tmp_path / "mask.png", (20, 20))) == 255).sum() == 25


# Files that simply work


def test_a_photograph_is_turned_upright(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6  # turned a quarter clockwise by the viewer
    image = Image.new("RGB", (40, 20), "blue")
    image.paste("red", (0, 0, 20, 20))
    image.save(tmp_path / "photo.png", exif=exif)
    upright = read_image(tmp_path / "photo.png")
    assert upright.size == (20, 40)
    assert upright.getpixel((10, 5)) == (255, 0, 0) and upright.getpixel((10, 35)) == (0, 0, 255)


@pytest.mark.parametrize("suffix", [".png", ".tif", ".pgm"])  # modes I;16, I;16 and I
def test_sixteen_bits_are_scaled_not_clipped(tmp_path, suffix):
    values = np.array([[0, 257 * 10, 257 * 100, 65535]], np.uint16)
    path = tmp_path / f"deep{suffix}"
    if suffix == ".pgm":
        path.write_bytes(b"P5 4 1 65535\n" + values.astype(">u2").tobytes())
    else:
        Image.fromarray(values).save(path)
    assert [p[0] for p in np.array(read_image(path))[0]] == [0, 10, 100, 255]


def test_float_pictures_are_scaled_and_refused_out_of_range(tmp_path):
    Image.fromarray(np.array([[0, 0.5, 1]], np.float32)).save(tmp_path / "float.tif")
    assert np.array(read_image(tmp_path / "float.tif"))[0, :, 0].tolist() == [0, 128, 255]
    for value in (99, -1, np.nan):
        Image.fromarray(np.array([[0, value]], np.float32)).save(tmp_path / "float.tif")
        with pytest.raises(UserError, match="pixel values outside"):
            read_image(tmp_path / "float.tif")


def test_cmyk_keeps_its_colour(tmp_path):
    Image.new("CMYK", (16, 16), (0, 255, 255, 0)).save(tmp_path / "print.jpg")
    red, green, blue = read_image(tmp_path / "print.jpg").getpixel((8, 8))
    assert red > 250 and green < 5 and blue < 5


def test_palette_one_bit_and_grey_pictures_become_rgb(tmp_path):
    Image.new("RGB", (4, 4), (10, 200, 30)).quantize(4).save(tmp_path / "palette.png")
    Image.new("1", (4, 4), 1).save(tmp_path / "bit.png")
    Image.new("L", (4, 4), 77).save(tmp_path / "grey.png")
    for name, colour in (("palette", (10, 200, 30)), ("bit", (255,) * 3), ("grey", (77,) * 3)):
        image = read_image(tmp_path / f"{name}.png")
        assert image.mode == "RGB" and image.getpixel((2, 2)) == colour


@pytest.mark.parametrize(
    "mode", ["RGBA", "LA", "palette with one colour", "palette with levels", "RGB with one colour"]
)
def test_transparency_is_laid_on_white(tmp_path, mode):
    """Left half opaque black, right half transparent black."""
    path = tmp_path / "cut out.png"
    image = Image.new("RGBA", (4, 2), (0, 0, 0, 255))
    image.paste((0, 0, 0, 0), (2, 0, 4, 2))
    if mode in ("RGBA", "LA"):
        image.convert(mode).save(path)
    elif mode.startswith("palette"):
        palette = Image.new("P", (4, 2), 0)
        palette.putpalette([0, 0, 0] * 256)
        palette.paste(1, (2, 0, 4, 2))
        palette.save(path, transparency=1 if "one" in mode else b"\xff\x00")
    else:
        image = Image.new("RGB", (4, 2), "black")
        image.paste((1, 2, 3), (2, 0, 4, 2))
        image.save(path, transparency=(1, 2, 3))
    assert np.array(read_image(path))[0, :, 0].tolist() == [0, 0, 255, 255]


def test_half_transparent_is_half_white(tmp_path):
    Image.new("RGBA", (2, 2), (0, 0, 0, 128)).save(tmp_path / "glass.png")
    assert read_image(tmp_path / "glass.png").getpixel((0, 0)) == (127, 127, 127)


@pytest.mark.parametrize("suffix", ["gif", "png", "webp", "tif"])
def test_an_animation_gives_its_first_frame(tmp_path, suffix):
    first, second = Image.new("RGB", (8, 8), "red"), Image.new("RGB", (8, 8), "blue")
    options = {"lossless": True} if suffix == "webp" else {}
    first.save(tmp_path / f"moving.{suffix}", save_all=True, append_images=[second], **options)
    assert read_image(tmp_path / f"moving.{suffix}").getpixel((4, 4)) == (255, 0, 0)


# Files that are the user's mistake


@pytest.mark.parametrize(
    "fault", ["missing", "folder", "empty", "text", "cut jpeg", "cut png", "name too long"]
)
def test_a_file_that_is_no_picture_is_refused_in_one_line_that_names_it(tmp_path, fault):
    path = tmp_path / ("x" * 300 if fault == "name too long" else "photo.jpg")
    if fault == "folder":
        path.mkdir()
    elif fault == "empty":
        path.touch()
    elif fault == "text":
        path.write_text("hello\n" * 100)
    elif fault.startswith("cut"):
        noise((64, 64)).save(path, fault.split()[1].upper())
        path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    with pytest.raises(UserError) as error:
        read_image(path)
    message = str(error.value)
    expected = {"missing": "no such file", "folder": "not a file", "empty": "empty", "text": "not an image"}
    assert message.startswith(f"{path}: ") and "\n" not in message
    assert expected.get(fault, "cannot be read" if "cut" in fault else "no such file") in message


@pytest.mark.parametrize("pillows_own_limit", [None, 89478485])
@pytest.mark.parametrize("size", [(14_000, 13_000), (1_000_000, 1_000)])
def test_a_decompression_bomb_is_refused_from_its_header(tmp_path, monkeypatch, pillows_own_limit, size):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", pillows_own_limit)
    path = tmp_path / "bomb.png"
    path.write_bytes(png_without_pixels(*size))  # to decode it would fail for another reason
    with pytest.raises(UserError, match=r"bomb\.png: more than 178 megapixels"):
        read_image(path)


def test_a_large_picture_is_read_without_a_warning(tmp_path, monkeypatch):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 100)  # Pillow warns from here, raises from twice as many
    Image.new("RGB", (12, 12)).save(tmp_path / "large.png")
    Image.new("P", (4, 4)).save(tmp_path / "palette.png", transparency=b"\x00")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert read_image(tmp_path / "large.png").size == (12, 12)
        read_image(tmp_path / "palette.png")


# Writing


@pytest.mark.parametrize("fault", ["folder", "no folder", "not png", "parent is a file"])
def test_a_path_that_cannot_hold_the_result_is_refused_before_and_while_writing(tmp_path, fault):
    path = tmp_path / "out.png"
    if fault == "folder":
        path.mkdir()
    elif fault == "no folder":
        path = tmp_path / "missing" / "out.png"
    elif fault == "not png":
        path = tmp_path / "out.jpg"
    elif fault == "parent is a file":
        path.touch()
        path = path / "out.png"
    before = sorted(tmp_path.rglob("*"))
    for attempt in (lambda: check_png_path(path), lambda: save_png(noise((4, 4)), path)):
        with pytest.raises(UserError) as error:
            attempt()
        assert str(error.value).startswith(f"{path}: ") and "\n" not in str(error.value)
    assert sorted(tmp_path.rglob("*")) == before


def test_a_folder_without_write_permission_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(
        "os.access", lambda path, mode: False
    )  # chmod would not stop root, who runs many a CI
    with pytest.raises(UserError, match="cannot be written to"):
        check_png_path(tmp_path / "out.png")


def test_a_write_that_fails_half_way_leaves_the_old_file_and_nothing_else(tmp_path, monkeypatch):
    save_png(noise((4, 4)), tmp_path / "out.png")
    before = (tmp_path / "out.png").read_bytes()

    def full_disk(image, path, *_):
        path.write_bytes(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Image.Image, "save", full_disk)
    with pytest.raises(UserError, match=r"out\.png: cannot be written \(No space left on device\)"):
        save_png(noise((4, 4), seed=1), tmp_path / "out.png")
    assert [path.name for path in tmp_path.iterdir()] == ["out.png"]
    assert (tmp_path / "out.png").read_bytes() == before


# Helpers


def picture(array: torch.Tensor) -> Image.Image:
    """What `read_image` would have made of it: grey photographs are RGB, masks stay L."""
    image = Image.fromarray(array.numpy())
    return image.convert("RGB") if array is TARGETPAD.inputs["grey"] else image


def noise(size: tuple[int, int], seed: int = 0) -> Image.Image:
    return Image.fromarray(
        np.random.default_rng(seed).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    )


def close(ours: torch.Tensor, theirs: torch.Tensor, atol: float) -> None:
    torch.testing.assert_close(ours, theirs, atol=atol, rtol=0)


def png_without_pixels(width: int, height: int) -> bytes:
    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", b"") + chunk(b"IEND", b"")
