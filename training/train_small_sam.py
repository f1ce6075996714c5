"""Train the small SAM that the project carries, on scenes that the project generates.

    python training/train_small_sam.py --minutes 110 --out hypersam/assets/small_sam.pth

The network is segment-anything's own ``Sam`` at a small size: pictures of 256 pixels, patches of 8, a ViT
with windowed and global blocks and relative positions, the prompt encoder and the two-way mask decoder.
The recipe is SAM's (Kirillov et al. 2023, section 3 and appendix A): focal and dice loss at 20 to 1 and a
mean-square loss on the predicted IoU, points and jittered boxes, loss only through the best of the three
masks, then a corrective click drawn from the error with the previous logits as mask input. It departs in
four ways: the single-mask token is trained on every prompt; a linear head, thrown away afterwards, learns
from all pixels at once which belong together, since a few prompts a picture teach the encoder slowly;
matrices are optimised by Muon; and the learning rate follows the clock rather than a step count, so that
the run ends when it was told to. A GPU is used if there is one.
"""

from __future__ import annotations

import argparse
import copy
import math
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from segment_anything.modeling import (
    ImageEncoderViT,
    MaskDecoder,
    PromptEncoder,
    Sam,
    TwoWayTransformer,
)  # fmt: skip
from torch import Tensor, nn
from torch.utils.data import DataLoader, IterableDataset

from hypersam.scenes import Scene, make_scene, scenes

SIDE, PATCH, WIDTH, DEPTH, HEADS, WINDOW = 256, 8, 144, 8, 4, 8
GLOBAL_BLOCKS = (3, 7)
PROMPT_DIM, DECODER_MLP = 128, 1024


def build_small_sam() -> Sam:
    """The official ``Sam`` class with randomly initialised weights of the carried size."""
    grid = SIDE // PATCH
    return Sam(
        image_encoder=ImageEncoderViT(
            img_size=SIDE, patch_size=PATCH, embed_dim=WIDTH, depth=DEPTH, num_heads=HEADS,
            mlp_ratio=4, out_chans=PROMPT_DIM, qkv_bias=True, use_rel_pos=True, window_size=WINDOW,
            global_attn_indexes=GLOBAL_BLOCKS, norm_layer=partial(nn.LayerNorm, eps=1e-6),
        ),
        prompt_encoder=PromptEncoder(
            embed_dim=PROMPT_DIM, image_embedding_size=(grid, grid), input_image_size=(SIDE, SIDE),
            mask_in_chans=16,
        ),
        mask_decoder=MaskDecoder(
            num_multimask_outputs=3, transformer_dim=PROMPT_DIM, iou_head_depth=3, iou_head_hidden_dim=128,
            transformer=TwoWayTransformer(depth=2, embedding_dim=PROMPT_DIM, mlp_dim=DECODER_MLP, num_heads=8),
        ),
    )  # fmt: skip


Decode = Callable[[Sam, Tensor, Tensor, Tensor], tuple[Tensor, Tensor]]


class Prompts(IterableDataset[tuple[Tensor, Tensor, Tensor, Tensor]]):
    """Endless training scenes: image (uint8, 3xHxW), masks (bool, NxHxW) and corners (float, Nx2x2, the second
    NaN for clicks) of the prompts, and for every second pixel the number of its object (0: none)."""

    def __init__(self, first: int, per_image: int) -> None:
        self.first, self.per_image = first, per_image

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor, Tensor, Tensor]]:
        info = torch.utils.data.get_worker_info()
        seed, step = (self.first + info.id, info.num_workers) if info else (self.first, 1)
        while True:
            scene = make_scene(seed, split="train", size=SIDE)
            if scene.objects:
                yield *draw_prompts(scene, np.random.default_rng(seed), self.per_image), owners(scene)
            seed += step


def draw_prompts(scene: Scene, rng: np.random.Generator, count: int) -> tuple[Tensor, Tensor, Tensor]:
    """``count`` prompts: half clicks inside an object, half boxes jittered as SAM's (10 % of a side, 20 px at most)."""
    order = rng.permutation(len(scene.objects))
    masks, corners = [], []
    for i in range(count):
        thing = scene.objects[order[i % len(order)]]
        masks.append(thing.mask)
        if (i + i // len(order)) % 2:
            x0, y0, x1, y1 = thing.box
            sides = np.array([x1 - x0, y1 - y0] * 2)
            jitter = np.clip(rng.normal(0, 0.1 * rng.random() * sides), -20, 20)
            box = np.clip(np.array([x0, y0, x1, y1]) + jitter, 0, SIDE)
            corners.append(box.reshape(2, 2))
        else:
            y, x = click_inside(thing.mask, rng)
            corners.append(np.array([[x, y], [np.nan, np.nan]]))
    image = torch.from_numpy(np.ascontiguousarray(scene.image.transpose(2, 0, 1)))
    return image, torch.from_numpy(np.stack(masks)), torch.from_numpy(np.stack(corners)).float()


def owners(scene: Scene) -> Tensor:
    """Number of the object that every second pixel shows, 0 for none (int64)."""
    owner = np.zeros((SIDE // 2, SIDE // 2), np.int64)
    for number, thing in enumerate(scene.objects, 1):
        owner[thing.mask[::2, ::2]] = number
    return torch.from_numpy(owner)


class GroupingHead(nn.Module):
    """A short vector for every second pixel, near to those of its own object and far from all others.

    It trains the image encoder and is not part of the model.
    """

    def __init__(self, vector: int = 16, samples: int = 640, reach: int = 6) -> None:
        super().__init__()
        self.scale = SIDE // 2 // (SIDE // PATCH)
        self.project = nn.Conv2d(PROMPT_DIM, vector * self.scale**2, 1)
        nn.init.normal_(self.project.weight, std=0.02)
        self.slope, self.offset = nn.Parameter(torch.zeros(())), nn.Parameter(torch.ones(()))
        self.samples, self.reach = samples, reach

    def forward(self, embeddings: Tensor, owner: Tensor) -> Tensor:
        """Mean loss over random pairs of pixels of a picture, and over pairs of near ones."""
        vectors = F.pixel_shuffle(self.project(embeddings), self.scale)
        batch, _, side, _ = vectors.shape
        picture = torch.arange(batch, device=owner.device)[:, None]
        y, x = torch.randint(side, (2, batch, self.samples), device=owner.device)
        move = torch.randint(-self.reach, self.reach + 1, (2, batch, self.samples), device=owner.device)
        near_y, near_x = (y + move[0]).clamp(0, side - 1), (x + move[1]).clamp(0, side - 1)
        a, near = vectors[picture, :, y, x], vectors[picture, :, near_y, near_x]
        own, near_own = owner[picture, y, x], owner[picture, near_y, near_x]
        length = a.square().sum(-1)
        apart = (length[:, :, None] + length[:, None] - 2 * (a @ a.transpose(1, 2))).clamp(min=0)
        far = self._loss(apart, own[:, :, None], own[:, None].expand(-1, self.samples, -1))
        return far + self._loss((a - near).square().sum(-1), own, near_own)

    def _loss(self, distance: Tensor, one: Tensor, other: Tensor) -> Tensor:
        """Cross-entropy of 'the same object', equal and unequal pairs weighing the same in sum."""
        logit = self.offset - self.slope.exp() * distance
        same, counts = one == other, (one > 0) | (other > 0)
        each = F.binary_cross_entropy_with_logits(logit, same.float(), reduction="none")
        equal, unequal = (same & counts), (~same & counts)
        return (each * equal).sum() / equal.sum().clamp(min=1) + (each * unequal).sum() / unequal.sum().clamp(min=1)


def click_inside(mask: np.ndarray, rng: np.random.Generator) -> tuple[int, int]:
    """A random pixel (y, x) of the mask; two times in three one of the deeper half."""
    candidates = mask
    if rng.random() < 0.67:
        p = np.pad(mask, 2)
        inner = mask.copy()
        for dy, dx in ((0, 2), (4, 2), (2, 0), (2, 4)):
            inner &= p[dy : dy + mask.shape[0], dx : dx + mask.shape[1]]
        if inner.any():
            candidates = inner
    ys, xs = np.nonzero(candidates)
    pick = rng.integers(len(ys))
    return int(ys[pick]), int(xs[pick])


def embed_prompts(sam: Sam, corners: Tensor) -> Tensor:
    """Sparse prompt tokens (N, 2, C): box corners, or a click and SAM's padding point."""
    boxed = ~corners[:, 1, 0].isnan()
    encoder = sam.prompt_encoder
    tokens = torch.empty(len(corners), 2, encoder.embed_dim)
    tokens = tokens.to(corners.device)
    if boxed.any():
        tokens[boxed] = encoder._embed_boxes(corners[boxed].reshape(-1, 4)).float()
    if (~boxed).any():
        labels = torch.ones(int((~boxed).sum()), 1, device=corners.device)
        tokens[~boxed] = encoder._embed_points(corners[~boxed][:, :1], labels, pad=True).float()
    return tokens


def mask_losses(logits: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
    """Focal (gamma 2) and dice loss a mask. logits (N, M, h, w); target (N, 1, h, w), soft in [0, 1]."""
    p = logits.sigmoid()
    bce = F.binary_cross_entropy_with_logits(logits, target.expand_as(logits), reduction="none")
    focal = (bce * (target - p).square()).mean((-2, -1))
    overlap = (p * target).sum((-2, -1))
    dice = 1 - (2 * overlap + 1) / (p.sum((-2, -1)) + target.sum((-2, -1)) + 1)
    return focal, dice


def mask_iou(logits: Tensor, target: Tensor) -> Tensor:
    ours, true = logits > 0, target > 0.5
    union = (ours | true).sum((-2, -1)).clamp(min=1)
    return (ours & true).sum((-2, -1)) / union


def decode(sam: Sam, embeddings: Tensor, sparse: Tensor, dense: Tensor) -> tuple[Tensor, Tensor]:
    """``MaskDecoder.predict_masks`` for several pictures at once, each with its equal share of the prompts.

    embeddings (B, C, h, w); sparse (B N, T, C); dense (B N, C, h, w). Returns logits (B N, 4, 4h, 4w) and
    predicted IoU (B N, 4).
    """
    decoder, count = sam.mask_decoder, len(sparse)
    tokens = torch.cat([decoder.iou_token.weight, decoder.mask_tokens.weight])
    tokens = torch.cat([tokens.expand(count, -1, -1), sparse], 1)
    source = embeddings.repeat_interleave(count // len(embeddings), 0) + dense
    positions = sam.prompt_encoder.get_dense_pe().expand(count, -1, -1, -1)
    tokens, source = decoder.transformer(source, positions, tokens)
    grid = embeddings.shape[-2:]
    upscaled = decoder.output_upscaling(source.transpose(1, 2).reshape(count, -1, *grid))
    weights = torch.stack([mlp(tokens[:, 1 + i]) for i, mlp in enumerate(decoder.output_hypernetworks_mlps)], 1)
    masks = (weights @ upscaled.flatten(2)).unflatten(2, upscaled.shape[-2:])
    return masks.float(), decoder.iou_prediction_head(tokens[:, 0]).float()


def decoding_loss(masks: Tensor, iou: Tensor, target: Tensor) -> Tensor:
    """Best of the three masks, the single mask, and the IoU head. masks (N, 4, h, w)."""
    focal, dice = mask_losses(masks, target)
    each = 20 * focal + dice
    best = each[:, 1:].amin(1).mean() + each[:, 0].mean()
    return best + F.mse_loss(iou, mask_iou(masks.detach(), target))


def prompts_loss(
    sam: Sam, embeddings: Tensor, masks: Tensor, corners: Tensor, correct: bool, decode: Decode = decode
) -> Tensor:
    """Loss of all prompts of some pictures; ``correct`` adds a second round from the errors of the first.

    embeddings (B, C, h, w); masks (B, N, H, W); corners (B, N, 2, 2).
    """
    low, (pictures, count) = SIDE * 4 // PATCH, masks.shape[:2]
    target = F.adaptive_avg_pool2d(masks.float(), low).flatten(0, 1)[:, None]
    no_mask = sam.prompt_encoder.no_mask_embed.weight.reshape(1, -1, 1, 1)
    sparse = embed_prompts(sam, corners.flatten(0, 1))
    logits, iou = decode(sam, embeddings, sparse, no_mask.expand(len(sparse), -1, *embeddings.shape[-2:]))
    loss = decoding_loss(logits, iou, target)
    if not correct:
        return loss
    first = (torch.arange(pictures * count, device=masks.device) % count) < count // 2
    with torch.no_grad():
        target = target[first]
        best = iou[first, 1:].argmax(1)
        chosen = logits[first, 1:][torch.arange(len(best), device=best.device), best]
        wrong = (chosen > 0) != (target[:, 0] > 0.5)
        spot = torch.multinomial(wrong.flatten(1).float() + 1e-6, 1)[:, 0]
        label = (target.flatten(1).gather(1, spot[:, None]) > 0.5).float()
        point = (torch.stack([spot % low, spot // low], -1).float() + 0.5) * (SIDE / low)
    click = sam.prompt_encoder._embed_points(point[:, None] - 0.5, label, pad=False)
    dense = sam.prompt_encoder._embed_masks(chosen[:, None].clamp(-32, 32))
    logits, iou = decode(sam, embeddings, torch.cat([sparse[first], click], 1), dense)
    return loss + 0.5 * decoding_loss(logits, iou, target)


@torch.no_grad()
def held_out_iou(sam: Sam, count: int) -> tuple[float, float]:
    """Mean IoU with one central click and with the exact box, on held-out scenes (a quick look, not the yardstick)."""
    sam.eval()
    device = sam.device
    found: list[list[float]] = [[], []]
    for scene in scenes(0, count, size=SIDE):
        if not scene.objects:
            continue
        image = torch.from_numpy(scene.image).permute(2, 0, 1).float().to(device)
        embedding = sam.image_encoder(sam.preprocess(image)[None])
        masks = torch.from_numpy(np.stack([o.mask for o in scene.objects])).to(device)
        rng = np.random.default_rng(7)
        clicks = torch.tensor([click_inside(o.mask, rng)[::-1] for o in scene.objects]).float()
        boxes = torch.tensor([o.box for o in scene.objects]).float()
        for kind, corners in enumerate(
            (torch.stack([clicks, torch.full_like(clicks, math.nan)], 1), boxes.reshape(-1, 2, 2))
        ):
            sparse = embed_prompts(sam, corners.to(device))
            no_mask = sam.prompt_encoder.no_mask_embed.weight.reshape(1, -1, 1, 1)
            dense = no_mask.expand(len(corners), -1, *embedding.shape[-2:])
            logits, iou = decode(sam, embedding, sparse, dense)
            pick = iou[:, 1:].argmax(1) + 1
            chosen = logits[torch.arange(len(pick), device=device), pick][:, None]
            chosen = F.interpolate(chosen, (SIDE, SIDE), mode="bilinear", align_corners=False)
            found[kind] += mask_iou(chosen[:, 0], masks).tolist()
    sam.train()
    return float(np.mean(found[0])), float(np.mean(found[1]))


def optimizers(sam: Sam, lr: float) -> list[torch.optim.Optimizer]:
    """Muon for the matrices inside the blocks, AdamW for everything else."""
    matrices, others = [], []
    for name, p in sam.named_parameters():
        inside = ".blocks." in name or ".transformer." in name
        (matrices if inside and p.ndim == 2 and "rel_pos" not in name else others).append(p)
    muon = torch.optim.Muon(matrices, lr=lr, weight_decay=0.02, adjust_lr_fn="match_rms_adamw")
    return [muon, torch.optim.AdamW(others, lr=lr, betas=(0.9, 0.98), weight_decay=0.01)]


def rate(elapsed: float, warm: float = 0.02) -> float:
    """Share of the peak learning rate at a share of the time: warm up, hold, fall linearly to nothing."""
    return min(1.0, elapsed / warm, max(0.0, (1 - elapsed) / 0.7))


def main() -> None:
    ask = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    ask.add_argument("--minutes", type=float, default=110)
    ask.add_argument("--out", type=Path, required=True)
    ask.add_argument("--batch", type=int, default=4, help="pictures a step")
    ask.add_argument("--prompts", type=int, default=6, help="prompts a picture")
    ask.add_argument("--lr", type=float, default=1.5e-3)
    ask.add_argument("--workers", type=int, default=1)
    ask.add_argument("--grouping", type=float, default=1.0, help="weight of the pixel grouping loss")
    ask.add_argument("--start", type=Path, help="weights to begin from")
    ask.add_argument("--first-scene", type=int, default=0)
    ask.add_argument("--compile", action="store_true", help="torch.compile encoder and decoder")
    ask.add_argument("--report-every", type=float, default=5, help="minutes between looks at held-out scenes")
    options = ask.parse_args()

    torch.manual_seed(0)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    sam = build_small_sam().to(device)
    if options.start:
        sam.load_state_dict(torch.load(options.start, weights_only=True))
    print(f"{sum(p.numel() for p in sam.parameters()) / 1e6:.2f} M parameters on {device}", flush=True)
    average = copy.deepcopy(sam).eval()
    encode = torch.compile(sam.image_encoder) if options.compile else sam.image_encoder
    decoder = torch.compile(decode, dynamic=False) if options.compile else decode
    grouping = GroupingHead().to(device)
    steppers = optimizers(sam, options.lr)
    steppers[1].add_param_group({"params": list(grouping.parameters())})
    loader = DataLoader(
        Prompts(options.first_scene, options.prompts), batch_size=options.batch,
        num_workers=options.workers, prefetch_factor=8 if options.workers else None,
    )  # fmt: skip
    began, reported, running = time.monotonic(), 0.0, np.zeros(2)
    for step, (images, masks, corners, owner) in enumerate(loader):
        elapsed = (time.monotonic() - began) / (60 * options.minutes)
        if elapsed >= 1:
            break
        images, masks, corners = images.to(device), masks.to(device), corners.to(device)
        for stepper in steppers:
            for group in stepper.param_groups:
                group["lr"] = options.lr * rate(elapsed)
        with torch.autocast(device.type, torch.bfloat16):
            embeddings = encode(sam.preprocess(images.float())).float()
        correct = elapsed > 0.4 and step % 4 == 0
        # The decoder stays in fp32: its matrices are small, and on a CPU bf16 makes them slower.
        loss = prompts_loss(sam, embeddings, masks, corners, correct, decoder)
        group_loss = grouping(embeddings, owner.to(device))
        (loss + options.grouping * group_loss).backward()
        nn.utils.clip_grad_norm_(sam.parameters(), 1.0)
        for stepper in steppers:
            stepper.step()
            stepper.zero_grad(set_to_none=True)
        keep = min(0.998, (step + 1) / (step + 20))
        with torch.no_grad():
            torch._foreach_lerp_(list(average.parameters()), list(sam.parameters()), 1 - keep)
        losses = np.array([loss.item(), group_loss.item()])
        running = losses if not step else 0.98 * running + 0.02 * losses
        minutes = (time.monotonic() - began) / 60
        if step in (20, 100) or minutes - reported >= options.report_every:
            reported = minutes
            point, box = held_out_iou(average, 40)
            print(
                f"{minutes:6.1f} min  step {step:6d}  loss {running[0]:.4f} + {running[1]:.4f}  "
                f"point {point:.4f}  box {box:.4f}",
                flush=True,
            )
            save(average, options.out)
    save(average, options.out)
    point, box = held_out_iou(average, 300)
    print(f"final: {step * options.batch} pictures, point {point:.4f}, box {box:.4f}")


def save(sam: Sam, path: Path) -> None:
    """Write the state dict beside ``path`` and rename it, so that a reader never sees half a file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(path.name + ".part")
    torch.save({k: v.detach().cpu().contiguous() for k, v in sam.state_dict().items()}, part)
    part.replace(path)


if __name__ == "__main__":
    main()
