"""The detector computed as in the original implementation, as the baseline of the benchmarks.

Every function takes a module of `vitadapter_zoo` for its weights and computes the same result with
the operations of the code that trained the checkpoints. Windows are cut by unfold and merged by
fold. Softmax attention stores its weights in memory. Deformable attention uses grid_sample.
BatchNorm is a separate step. All classes are decoded, and the masks of all classes are computed.
Results agree except for rounding; ``benchmarks/inference.py`` checks this before it measures.
"""

from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchvision.ops import nms, roi_align

from vitadapter_zoo.models import adapter, heads, necks, uniperceiver, vit, vit_adapter
from vitadapter_zoo.models.boxes import ROI_STRIDES, anchors, box_limits, decode

Grid = tuple[int, int]


def linear(layer: nn.Module, x: Tensor) -> Tensor:
    """Apply a linear layer with PyTorch's own operator."""
    return F.linear(x, cast("Tensor", layer.weight), cast("Tensor", layer.bias))


def convolved(layer: Tensor | nn.Module, x: Tensor) -> Tensor:
    """Apply a convolution with PyTorch's own operator."""
    layer = cast("nn.Conv2d", layer)
    return F.conv2d(
        x,
        layer.weight,
        layer.bias,
        layer.stride,
        cast("tuple[int, int]", layer.padding),
        groups=layer.groups,
    )


def upsampled(layer: nn.ConvTranspose2d, x: Tensor) -> Tensor:
    """Apply a transposed convolution with PyTorch's own operator."""
    return F.conv_transpose2d(x, layer.weight, layer.bias, layer.stride)


def normalised(layer: nn.BatchNorm2d, x: Tensor) -> Tensor:
    """Apply BatchNorm with PyTorch's own operator; use the batch's statistics in training."""
    return F.batch_norm(
        x,
        layer.running_mean,
        layer.running_var,
        layer.weight,
        layer.bias,
        layer.training,
        eps=layer.eps,
    )


def sequence(layers: nn.Module, x: Tensor) -> Tensor:
    """Apply convolutions, BatchNorms, ReLUs and pooling in sequence."""
    for layer in cast("nn.Sequential", layers):
        if isinstance(layer, nn.Conv2d):
            x = convolved(layer, x)
        elif isinstance(layer, nn.BatchNorm2d):
            x = normalised(layer, x)
        elif isinstance(layer, nn.ConvTranspose2d):
            x = upsampled(layer, x)
        else:
            x = layer(x)
    return x


def to_map(tokens: Tensor, grid: Grid) -> Tensor:
    """Copy tokens ``[N, H * W, C]`` to a contiguous map ``[N, C, H, W]``."""
    return tokens.transpose(1, 2).reshape(tokens.shape[0], -1, *grid).contiguous()


def positions(embedding: Tensor, grid: Grid) -> Tensor:
    """Resize position embeddings ``[side * side, C]`` to ``[1, H * W, C]``."""
    side = int(embedding.shape[0] ** 0.5)
    square = embedding.reshape(1, side, side, -1).permute(0, 3, 1, 2)
    resized = F.interpolate(square, grid, mode="bicubic", align_corners=False)
    return resized.flatten(2).transpose(1, 2)


def softmax_attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Compute attention over ``[..., L, C]`` with its ``[..., L, L]`` weights in memory."""
    logits = (q @ k.transpose(-2, -1)) * q.shape[-1] ** -0.5
    return logits.softmax(dim=-1) @ v


def global_attention(qkv: Tensor, count: int) -> Tensor:
    """Compute attention with ``count`` heads from ``[N, L, 3 * C]``; return ``[N, L, C]``."""
    n, length, width = qkv.shape
    q, k, v = qkv.reshape(n, length, 3, count, width // (3 * count)).permute(2, 0, 3, 1, 4)
    return softmax_attention(q, k, v).transpose(1, 2).reshape(n, length, width // 3)


def window_attention(qkv: Tensor, count: int, grid: Grid) -> Tensor:
    """Compute attention in windows of a padded map ``[N, 3 * C, H, W]``; crop it to ``grid``."""
    size = vit.WINDOW
    n, width, height_padded, width_padded = qkv.shape
    channels = width // 3
    cut = F.unfold(qkv, size, stride=size)
    windows = cut.shape[-1]
    parts = cut.view(n, 3, count, channels // count, size * size, windows)
    q, k, v = parts.permute(1, 0, 5, 2, 4, 3)  # [N, windows, heads, tokens, channels]
    attended = softmax_attention(q, k, v).permute(0, 2, 4, 3, 1)
    columns = attended.reshape(n, channels * size * size, windows)
    merged = F.fold(columns, (height_padded, width_padded), size, stride=size)
    return merged[:, :, : grid[0], : grid[1]].flatten(2).transpose(1, 2)


def padded_to_windows(x: Tensor) -> Tensor:
    """Pad ``[N, C, H, W]`` with zeros at the bottom and right to whole windows."""
    height, width = x.shape[2:]
    return F.pad(x, (0, -width % vit.WINDOW, 0, -height % vit.WINDOW))


def vit_block(block: vit.Block, x: Tensor, grid: Grid) -> Tensor:
    """Apply a block of the plain trunk, which pads the projected map."""
    attention = block.attn
    qkv = linear(attention.qkv, block.norm1(x))
    if attention.windowed:
        attended = window_attention(padded_to_windows(to_map(qkv, grid)), attention.heads, grid)
    else:
        attended = global_attention(qkv, attention.heads)
    x = x + block.gamma1 * linear(attention.proj, attended)
    hidden = F.gelu(linear(block.mlp.fc1, block.norm2(x)))
    return x + block.gamma2 * linear(block.mlp.fc2, hidden)


def uniperceiver_block(block: uniperceiver.Layer, x: Tensor, grid: Grid) -> Tensor:
    """Apply a block of the Uni-Perceiver trunk, which pads the input map."""
    attention = block.self_attn
    normed = block.norm1(x)
    if attention.windowed:
        padded = padded_to_windows(to_map(normed, grid))
        qkv = linear(attention.in_proj, padded.flatten(2).transpose(1, 2))
        padded_grid = (padded.shape[2], padded.shape[3])
        attended = window_attention(to_map(qkv, padded_grid), attention.heads, grid)
    else:
        attended = global_attention(linear(attention.in_proj, normed), attention.heads)
    x = x + block.gamma_1 * linear(attention.out_proj, attended)
    hidden = F.gelu(linear(block.linear1, block.norm2(x)))
    return x + block.gamma_2 * linear(block.linear2, hidden)


def trunk_block(block: nn.Module, x: Tensor, grid: Grid) -> Tensor:
    """Apply a block of either trunk."""
    if isinstance(block, vit.Block):
        return vit_block(block, x, grid)
    return uniperceiver_block(cast("uniperceiver.Layer", block), x, grid)


def deformable_attention(
    attn: adapter.MSDeformAttn, query: Tensor, points: Tensor, value: Tensor, grids: list[Grid]
) -> Tensor:
    """Attend from ``query`` ``[N, Q, C]`` at ``points`` ``[Q, 2]`` to ``value`` on the grids."""
    n, queries, _ = query.shape
    projected = linear(attn.value_proj, value).unflatten(-1, (attn.heads, -1))
    offsets = linear(attn.sampling_offsets, query)
    offsets = offsets.view(n, queries, attn.heads, len(grids), adapter.POINTS, 2)
    weights = linear(attn.attention_weights, query).unflatten(-1, (attn.heads, -1)).softmax(-1)
    sizes = query.new_tensor([(width, height) for height, width in grids])
    locations = 2 * (points[:, None, None, None] + offsets / sizes[:, None]) - 1

    sampled = []
    parts = projected.split([height * width for height, width in grids], dim=1)
    for level, (part, grid) in enumerate(zip(parts, grids, strict=True)):
        planes = part.flatten(2).transpose(1, 2).reshape(n * attn.heads, -1, *grid)
        at = locations[:, :, :, level].transpose(1, 2).flatten(0, 1)
        sampled.append(F.grid_sample(planes, at, align_corners=False))
    shares = weights.transpose(1, 2).reshape(n * attn.heads, 1, queries, -1)
    found = (torch.stack(sampled, dim=-2).flatten(-2) * shares).sum(-1)
    return linear(attn.output_proj, found.view(n, -1, queries).transpose(1, 2).contiguous())


def conv_ffn(ffn: adapter.ConvFFN, tokens: Tensor, grids: list[Grid]) -> Tensor:
    """Apply the feed-forward network with its depthwise convolution on each map."""
    hidden = linear(ffn.fc1, tokens)
    parts = hidden.split([height * width for height, width in grids], dim=1)
    maps = [
        convolved(ffn.dwconv.dwconv, to_map(part, grid)).flatten(2).transpose(1, 2)
        for part, grid in zip(parts, grids, strict=True)
    ]
    return linear(ffn.fc2, F.gelu(torch.cat(maps, dim=1)))


def extract(
    extractor: adapter.Extractor, c: Tensor, x: Tensor, points: Tensor, grids: list[Grid]
) -> Tensor:
    """Apply an extractor and return the prior's new tokens."""
    normed = extractor.query_norm(c), extractor.feat_norm(x)
    c = c + deformable_attention(extractor.attn, normed[0], points, normed[1], [grids[1]])
    return c + conv_ffn(extractor.ffn, extractor.ffn_norm(c), grids)


def adapted(
    backbone: adapter.WithAdapter, image: Tensor, x: Tensor, blocks: nn.Module
) -> list[Tensor]:
    """Run the trunk on its embedded tokens ``x`` with the adapter; return four maps."""
    height, width = image.shape[2:]
    grids = [(height // stride, width // stride) for stride in (8, 16, 32)]
    points = [adapter.cell_centres(*grid, image.device) for grid in grids]
    all_points = torch.cat(points)

    prior = backbone.spm
    hidden = [sequence(prior.stem, image)]
    for layers in (prior.conv2, prior.conv3, prior.conv4):
        hidden.append(sequence(layers, hidden[-1]))
    reduced = (prior.fc1, prior.fc2, prior.fc3, prior.fc4)
    c1, *rest = (convolved(layer, part) for layer, part in zip(reduced, hidden, strict=True))
    tokens = [part.flatten(2).transpose(1, 2) for part in rest]
    c = torch.cat([part + backbone.level_embed[i] for i, part in enumerate(tokens)], dim=1)

    trunk = list(cast("nn.ModuleList", blocks))
    quarter = len(trunk) // 4
    for index, module in enumerate(backbone.interactions):
        interaction = cast("adapter.InteractionBlock", module)
        injector = cast("adapter.Injector", interaction.injector)
        normed = injector.query_norm(x), injector.feat_norm(c)
        attended = deformable_attention(injector.attn, normed[0], points[1], normed[1], grids)
        x = x + injector.gamma * attended
        for block in trunk[index * quarter : (index + 1) * quarter]:
            x = trunk_block(block, x, grids[1])
        for extractor in (interaction.extractor, *interaction.extra_extractors):
            c = extract(cast("adapter.Extractor", extractor), c, x, all_points, grids)

    parts = c.split([h * w for h, w in grids], dim=1)
    c2, c3, c4 = (to_map(part, grid) for part, grid in zip(parts, grids, strict=True))
    maps = [c1 + upsampled(backbone.up, c2), c2, c3, c4]
    x = to_map(x, grids[1])
    norms = (backbone.norm1, backbone.norm2, backbone.norm3, backbone.norm4)
    resized = (
        F.interpolate(x, scale_factor=4, mode="bilinear", align_corners=False),
        F.interpolate(x, scale_factor=2, mode="bilinear", align_corners=False),
        x,
        F.interpolate(x, scale_factor=0.5, mode="bilinear", align_corners=False),
    )
    return [
        normalised(norm, part + more) for norm, part, more in zip(norms, maps, resized, strict=True)
    ]


def backbone(module: nn.Module, image: Tensor) -> list[Tensor]:
    """Compute the four maps of any of the three backbones from images ``[N, 3, H, W]``."""
    grid = (image.shape[2] // vit.PATCH, image.shape[3] // vit.PATCH)
    if isinstance(module, uniperceiver.UniPerceiverAdapter):
        embed = module.visual_embed.patch_embed
        x = convolved(embed.proj, image).flatten(2).transpose(1, 2)
        x = x + positions(embed.spatial_pos_embed.weight, grid) + embed.temporal_pos_embed.weight[0]
        return adapted(module, image, module.visual_embed.embeddings_norm(x), module.layers)
    trunk = cast("vit.VisionTransformer", module)
    x = convolved(trunk.patch_embed.proj, image).flatten(2).transpose(1, 2)
    x = x + positions(trunk.pos_embed[0, 1:], grid)
    if isinstance(trunk, vit_adapter.ViTAdapter):
        return adapted(trunk, image, x, trunk.blocks)
    plain = cast("vit.ViTBaseline", trunk)
    quarter = len(plain.blocks) // 4
    maps: list[Tensor] = []
    for index, block in enumerate(plain.blocks):
        x = trunk_block(block, x, grid)
        if (index + 1) % quarter == 0:
            norm = cast("nn.Module", getattr(plain, f"norm{len(maps) + 1}"))
            maps.append(to_map(norm(x), grid))
    return [
        sequence(plain.up1, maps[0]),
        upsampled(plain.up2, maps[1]),
        maps[2],
        F.max_pool2d(maps[3], 2, 2),
    ]


def neck(module: nn.Module, maps: list[Tensor]) -> list[Tensor]:
    """Apply either neck: four maps to five."""
    if isinstance(module, necks.ChannelMapper):
        levels = [
            F.relu(convolved(layer.conv, x)) for layer, x in zip(module.convs, maps, strict=True)
        ]
        return [*levels, F.max_pool2d(levels[-1], 2, stride=2)]
    fpn = cast("necks.FPN", module)
    merged = [convolved(layer.conv, x) for layer, x in zip(fpn.lateral_convs, maps, strict=True)]
    for finer in (2, 1, 0):
        coarser = F.interpolate(merged[finer + 1], merged[finer].shape[2:], mode="nearest")
        merged[finer] = merged[finer] + coarser
    levels = [convolved(layer.conv, x) for layer, x in zip(fpn.fpn_convs, merged, strict=True)]
    return [*levels, F.max_pool2d(levels[-1], 1, stride=2)]


def suppressed(boxes: Tensor, scores: Tensor, groups: Tensor, threshold: float) -> Tensor:
    """Suppress overlaps in each group and return the kept indices, best score first."""
    if len(boxes) == 0:
        return groups
    return nms(boxes + (groups.to(boxes) * (boxes.max() + 1))[:, None], scores, threshold)


def propose(head: heads.RPNHead, maps: list[Tensor], size: Grid) -> heads.Proposals:
    """Return the best 1000 boxes; all scores of every level are sorted."""
    kept: list[tuple[Tensor, Tensor, Tensor]] = []
    for level, (x, stride) in enumerate(zip(maps, heads.RPN_STRIDES, strict=True)):
        hidden = F.relu(convolved(head.rpn_conv, x))
        logits, deltas = convolved(head.rpn_cls, hidden)[0], convolved(head.rpn_reg, hidden)[0]
        scores, order = logits.permute(1, 2, 0).reshape(-1).sigmoid().sort(descending=True)
        scores, order = scores[: heads.PROPOSALS], order[: heads.PROPOSALS]
        grid = anchors(x.shape[2], x.shape[3], stride, x.device)
        deltas = deltas.permute(1, 2, 0).reshape(-1, 4)[order]
        boxes = decode(grid[order], deltas, heads.RPN_STDS, box_limits([size], grid)[0])
        solid = ((boxes[:, 2:] - boxes[:, :2]) > 0).all(dim=1)
        kept.append((boxes[solid], scores[solid], torch.full_like(order[solid], level)))
    boxes, scores, levels = (torch.cat(parts) for parts in zip(*kept, strict=True))
    best = suppressed(boxes, scores, levels, heads.RPN_NMS)[: heads.PROPOSALS]
    return heads.Proposals(boxes[best], scores[best])


def pooled(maps: list[Tensor], boxes: Tensor, size: int) -> Tensor:
    """Apply RoIAlign to each box on the level that fits its size: ``[R, 256, size, size]``."""
    side = ((boxes[:, 2] - boxes[:, 0]) * (boxes[:, 3] - boxes[:, 1])).sqrt()
    levels = (side / 56 + 1e-6).log2().floor().clamp(0, 3)
    rois = F.pad(boxes, (1, 0))
    result = maps[0].new_zeros(len(boxes), maps[0].shape[1], size, size)
    for level, (x, stride) in enumerate(zip(maps, ROI_STRIDES, strict=True)):
        own = levels == level
        if own.any():
            result[own] = roi_align(x, rois[own], size, 1 / stride, -1, aligned=True)
    return result


def detect_boxes(
    head: heads.BoxHead,
    maps: list[Tensor],
    proposals: heads.Proposals,
    size: Grid,
    scale: tuple[float, float, float, float],
    score_threshold: float,
) -> heads.BoxDetections:
    """Return the best 100 boxes; every class of every proposal is decoded."""
    x = pooled(maps, proposals.boxes, 7).flatten(1)
    for layer in head.shared_fcs:
        x = F.relu(linear(layer, x))
    scores = linear(head.fc_cls, x).softmax(-1)[:, :-1]
    deltas = linear(head.fc_reg, x)
    classes = scores.shape[1]
    sources = proposals.boxes[:, None].expand(-1, classes, 4).reshape(-1, 4)
    limits = box_limits([size], sources)[0]
    boxes = decode(sources, deltas.reshape(-1, 4), heads.BOX_STDS, limits)
    boxes = boxes / boxes.new_tensor(scale)
    labels = torch.arange(classes, device=scores.device).expand_as(scores).reshape(-1)
    chosen = (scores.reshape(-1) > score_threshold).nonzero().squeeze(1)
    boxes, found, labels = boxes[chosen], scores.reshape(-1)[chosen], labels[chosen]
    best = suppressed(boxes, found, labels, heads.BOX_NMS)[: heads.MAX_DETECTIONS]
    return heads.BoxDetections(boxes[best], found[best], labels[best])


def predict_masks(
    head: heads.MaskHead,
    maps: list[Tensor],
    found: heads.BoxDetections,
    scale: tuple[float, float, float, float],
) -> Tensor:
    """Return probabilities ``[N, 28, 28]``; masks of all classes are computed first."""
    x = pooled(maps, found.boxes * found.boxes.new_tensor(scale), 14)
    for layer in head.convs:
        x = F.relu(convolved(cast("necks.Conv", layer).conv, x))
    x = F.relu(upsampled(head.upsample, x))
    probabilities = convolved(head.conv_logits, x).sigmoid()
    return probabilities[torch.arange(len(found.labels), device=x.device), found.labels]


def paste(probabilities: Tensor, boxes: Tensor, size: Grid, threshold: float) -> Tensor:
    """Paste masks into the image, bool ``[N, H, W]``, mask by mask as the original on a CPU."""
    height, width = size
    device = boxes.device
    result = torch.zeros(len(boxes), height, width, dtype=torch.bool, device=device)
    for index, (mask, box) in enumerate(zip(probabilities, boxes, strict=True)):
        left, top = (box[:2].floor() - 1).clamp(min=0).int().tolist()
        right, bottom = (int(end) for end in (box[2:].ceil() + 1).tolist())
        right, bottom = min(right, width), min(bottom, height)
        x1, y1, x2, y2 = box
        x = (torch.arange(left, right, device=device) + 0.5 - x1) / (x2 - x1) * 2 - 1
        y = (torch.arange(top, bottom, device=device) + 0.5 - y1) / (y2 - y1) * 2 - 1
        x, y = (torch.where(torch.isinf(axis), 0.0, axis) for axis in (x, y))
        grid = torch.stack(torch.meshgrid(x, y, indexing="xy"), dim=-1)
        sampled = F.grid_sample(mask[None, None], grid[None], align_corners=False)
        result[index, top:bottom, left:right] = sampled[0, 0] >= threshold
    return result
