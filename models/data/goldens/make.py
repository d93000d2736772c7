"""Reference results of Pillow for the augmentation tests: python make.py (written with Pillow 13.0.0, numpy 2.4.6,
torchvision 0.29.2).

source.png   32 x 24, half a photograph, half noise, one channel of low contrast
ops.png      one 32 x 24 result under another, in the order of the lines of ops.txt
views.png    the same for views.txt, lines of name, argument, width, height: results for the upper left corner of that
             size, on black
resize_*.png results of Image.resize, named filter_WIDTHxHEIGHT[_LEFT.TOP.RIGHT.BOTTOM]: the box is cropped first
"""
import math
import pathlib

import numpy as np
from PIL import Image, ImageEnhance, ImageFilter, ImageOps
from torchvision.transforms import functional

here = pathlib.Path(__file__).parent
W, H = 32, 24
photo = Image.open(here / "../files/photos/coffee.jpg").convert("RGB")
source = np.array(photo.resize((W, H), Image.BICUBIC))
source[:, W // 2:] = np.random.default_rng(3).integers(0, 256, (H, W // 2, 3))
source[..., 2] = 60 + source[..., 2] // 3
source = Image.fromarray(source)
source.save(here / "source.png", optimize=True)

FILTERS = {"nearest": Image.NEAREST, "bilinear": Image.BILINEAR, "bicubic": Image.BICUBIC}
FILL = (124, 116, 104)


def affine(matrix, name):
    return source.transform(source.size, Image.AFFINE, matrix, resample=FILTERS[name], fillcolor=FILL)


def solarize_add(amount):
    table = [min(255, i + amount) if i < 128 else i for i in range(256)]
    return source.point(table * 3)


cases = [("autocontrast", [], ImageOps.autocontrast(source)), ("equalize", [], ImageOps.equalize(source)),
         ("invert", [], ImageOps.invert(source))]
cases += [("posterize", [bits], source.point([i & ~(2 ** (8 - bits) - 1) for i in range(256)] * 3)) for bits in (0, 1, 3, 4)]
cases += [("solarize", [t], ImageOps.solarize(source, t)) for t in (0, 26, 128, 256)]
cases += [("solarize_add", [a], solarize_add(a)) for a in (0, 60, 110)]
for name, kind in [("color", ImageEnhance.Color), ("contrast", ImageEnhance.Contrast),
                   ("brightness", ImageEnhance.Brightness), ("sharpness", ImageEnhance.Sharpness)]:
    cases += [(name, [f], kind(source).enhance(f)) for f in (0.0, 0.19, 0.55, 1.0, 1.37, 1.81)]
for name in ("bilinear", "bicubic"):
    cases += [("rotate", [d, name], source.rotate(d, resample=FILTERS[name], fillcolor=FILL)) for d in (-27.3, 0.0, 11.7)]
    cases += [("shear_x", [f, name], affine((1, f, 0, 0, 1, 0), name)) for f in (-0.27, 0.13)]
    cases += [("shear_y", [f, name], affine((1, 0, 0, f, 1, 0), name)) for f in (-0.27, 0.13)]
    cases += [("translate_x", [f, name], affine((1, 0, f * W, 0, 1, 0), name)) for f in (-0.4, 0.07)]
    cases += [("translate_y", [f, name], affine((1, 0, 0, 0, 1, f * H), name)) for f in (-0.4, 0.07)]
cases += [("rotate", [-27.3, "nearest"], source.rotate(-27.3, resample=Image.NEAREST, fillcolor=FILL))]

Image.fromarray(np.concatenate([np.array(image) for _, _, image in cases])).save(here / "ops.png", optimize=True)
(here / "ops.txt").write_text("".join(" ".join([name, *map(str, args)]) + "\n" for name, args, _ in cases))

for name, size, box in [("bicubic", (17, 23), None), ("bicubic", (70, 50), None), ("bicubic", (32, 32), (3, 2, 27, 21)),
                        ("bilinear", (20, 31), None), ("bilinear", (32, 32), (3, 2, 27, 21)), ("nearest", (64, 48), None)]:
    image = source.crop(box) if box else source
    label = f"{name}_{size[0]}x{size[1]}" + ("_" + ".".join(map(str, box)) if box else "")
    image.resize(size, FILTERS[name]).save(here / f"resize_{label}.png", optimize=True)


EDITS = {"hue": functional.adjust_hue, "blur": lambda image, sigma: image.filter(ImageFilter.GaussianBlur(sigma)),
         "brightness": functional.adjust_brightness, "contrast": functional.adjust_contrast,
         "saturation": functional.adjust_saturation, "gray": lambda image, _: functional.to_grayscale(image, 3),
         "solarize": functional.solarize}
cases = [("hue", f, W, H) for f in (-0.5, -0.4, -0.1, -0.003, 0.0, 0.05, 0.1, 0.25, 0.4, 0.5)]
cases += [("blur", s, W, H) for s in (0.0, 0.1, 0.37, 0.8, 1.0, 1.4142, 1.4143, 1.7, 2.0, 3.3, 7.0, 40.0)]
cases += [("blur", s, *size) for s in (0.7, 1.9, 5.0) for size in ((1, 1), (1, 24), (32, 1), (2, 3), (5, 4))]
cases += [(name, f, W, H) for name in ("brightness", "contrast", "saturation") for f in (0.6, 0.93, 1.4)]
cases += [(name, a, *size) for name, a in (("hue", 0.1), ("contrast", 1.3)) for size in ((1, 1), (1, 24))]
cases += [("gray", 0, W, H), ("solarize", 128, W, H)]
results = np.zeros((len(cases), H, W, 3), np.uint8)
for result, (name, argument, width, height) in zip(results, cases):
    result[:height, :width] = EDITS[name](source.crop((0, 0, width, height)), argument)
Image.fromarray(results.reshape(-1, W, 3)).save(here / "views.png", optimize=True)
(here / "views.txt").write_text("".join(" ".join(map(str, case)) + "\n" for case in cases))

# FNV-1a of a turned image with every fourth level of each channel: a constant of the tests of hue.rs
levels = np.arange(64, dtype=np.uint8) * 4 + np.arange(64, dtype=np.uint8) % 4
colours = np.stack(np.meshgrid(levels, levels, levels, indexing="ij"), -1).reshape(512, 512, 3)
for factor in (-0.31, 0.0, 0.1):
    value = 0xCBF29CE484222325
    for byte in np.asarray(functional.adjust_hue(Image.fromarray(colours), factor)).tobytes():
        value = (value ^ byte) * 0x100000001B3 % 2**64
    print(f"hue {factor}: {value:#018x}")
