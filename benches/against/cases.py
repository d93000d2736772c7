"""What is measured, and how many GFLOP it needs. See README.md."""


def matmul(*sizes):
    """GFLOP of a product whose sizes are given (batch sizes too)."""
    gflop = 2e-9
    for size in sizes:
        gflop *= size
    return gflop


BLOCK = matmul(8 * 197, 12 * 768 * 768) + 2 * matmul(8 * 12, 197, 197, 64)
CONV = matmul(8 * 56 * 56, 64 * 64 * 9)


def blocks(depth, width, tokens, batch=8):
    """Forward of a transformer's blocks."""
    return depth * (matmul(batch * tokens, 12 * width * width) + 2 * matmul(batch, tokens, tokens, width))


def mae_gflop():
    forward = blocks(12, 768, 50) + blocks(8, 512, 197)
    forward += matmul(8 * 50, 768, 512) + matmul(8 * 197, 512, 768)
    return 3 * forward + 2 * matmul(8 * 196, 768, 768)  # no gradient of the pixels


def flip_gflop(patches):
    """Of the text's attention all pairs of positions are counted, though half of them are masked."""
    forward = blocks(12, 768, 1 + patches, 16) + blocks(12, 512, 77, 16)
    return 3 * forward + 2 * matmul(16 * patches, 768, 768)


def resnet50_trunk():
    """Forward at 224², batch 8, without a head; and of this the stem, whose images need no gradient."""
    stem = matmul(8 * 112 * 112, 64 * 3 * 49)
    forward, inputs, side = stem, 64, 56
    for stage, repeats in enumerate([3, 4, 6, 3]):
        width = 64 << stage
        for i in range(repeats):
            stride = 2 if stage > 0 and i == 0 else 1
            pixels, side = 8 * side * side, side // stride
            forward += matmul(pixels, inputs * width) + matmul(8 * side * side, 9 * width * width)
            forward += matmul(8 * side * side, 4 * width * width)
            if i == 0:
                forward += matmul(8 * side * side, 4 * width * inputs)
            inputs = 4 * width
    return forward, stem


def resnet50_gflop():
    forward, stem = resnet50_trunk()
    return 3 * forward - stem + 3 * matmul(8, 2048, 1000)


def moco_gflop():
    forward, stem = resnet50_trunk()
    head = matmul(8, 2048, 2048) + matmul(8, 2048, 128)
    return 4 * (forward + head) - stem + 2 * matmul(8, 128, 65536)


def simsiam_gflop():
    forward, stem = resnet50_trunk()
    heads = 3 * matmul(8, 2048, 2048) + 2 * matmul(8, 2048, 512)
    return 2 * (3 * (forward + heads) - stem)


CLIP, MOCO = "contrastive/4096x512", "info_nce/256x65536x128"
# (name, what the table says, GFLOP or None). A worker that lacks a name answers so; the table shows a dash.
CASES = [
    ("fma_peak/1", "peak: multiply-adds in registers, 1 thread", matmul(10_000_000, 12, 16)),
    ("fma_peak/2", "peak, 2 threads", 2 * matmul(10_000_000, 12, 16)),
    ("matmul/1024x1024x1024", "matmul 1024³", matmul(1024, 1024, 1024)),
    ("matmul/4096x768x3072", "matmul 4096×768×3072", matmul(4096, 768, 3072)),
    ("qk/8x12x197x64", "q·kᵀ, [8,12,197,64]", matmul(96, 197, 197, 64)),
    ("av/8x12x197x64", "a·v, [8,12,197,64]", matmul(96, 197, 197, 64)),
    ("qk/128x12x50x64", "q·kᵀ, [128,12,50,64]", matmul(1536, 50, 50, 64)),
    ("av/128x12x50x64", "a·v, [128,12,50,64]", matmul(1536, 50, 50, 64)),
    ("layer_norm/forward", "layer_norm [8,197,768], forward", None),
    ("layer_norm/forward+backward", "layer_norm, forward + backward", None),
    ("softmax/forward", "softmax [8,197,768], forward", None),
    ("softmax/forward+backward", "softmax, forward + backward", None),
    ("gelu/forward", "gelu (erf) [8,197,768], forward", None),
    ("gelu/forward+backward", "gelu (erf), forward + backward", None),
    ("attention/8x12x197x64", "attention [8,12,197,64], forward + backward", 6 * matmul(96, 197, 197, 64)),
    ("attention/128x12x50x64", "attention [128,12,50,64], forward + backward", 6 * matmul(1536, 50, 50, 64)),
    (CLIP, "contrastive loss N 4096, d 512, forward + backward", 4 * matmul(4096, 512, 4096)),
    (MOCO, "MoCo logits 256×65536, d 128, forward + backward", 2 * matmul(256, 128, 65536)),
    ("conv2d/groups1", "conv2d 3×3 64→64, 56×56, batch 8, forward + backward", 3 * CONV),
    ("conv2d/groups4", "conv2d 3×3 64→64 in 4 groups, same", 3 * CONV / 4),
    ("resnet50", "ResNet-50, 224², batch 8, forward + backward", resnet50_gflop()),
    ("moco_v2_step", "MoCo v2 training step, ResNet-50, 224², K 65536, SGD, batch 8", moco_gflop()),
    ("simsiam_step", "SimSiam training step, ResNet-50, 224², two views, SGD, batch 8", simsiam_gflop()),
    ("vit_block", "ViT-B block, 197 tokens, batch 8, forward + backward", 3 * BLOCK),
    ("mae_step", "MAE ViT-B/16 pre-training step, 224², mask 0.75, AdamW, batch 8", mae_gflop()),
    ("flip_step", "FLIP training step, ViT-B/16, 224², mask 0.5, 77 tokens, AdamW, batch 16", flip_gflop(98)),
    ("clip_step", "the same without masking (CLIP)", flip_gflop(196)),
]
MEMORY_CASES = [CLIP, MOCO, "resnet50", "moco_v2_step", "simsiam_step", "mae_step", "flip_step", "clip_step"]
