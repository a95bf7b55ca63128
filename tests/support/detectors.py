"""Detectors of transformers in tiny configurations, with random weights and an input for each."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import transformers
from torch import Tensor, nn

# ResNet and Swin as tiny as their configurations allow.
_STAGES = ["stage2", "stage3", "stage4"]


def _resnet() -> Any:
    return transformers.ResNetConfig(
        embedding_size=8, hidden_sizes=[8, 16, 16, 16], depths=[1, 1, 1, 1], out_features=_STAGES
    )


def _swin(stages: list[str]) -> Any:
    return transformers.SwinConfig(
        image_size=64,
        embed_dim=8,
        depths=[1, 1, 1, 1],
        num_heads=[1, 1, 2, 2],
        window_size=4,
        out_features=stages,
    )


@dataclass(frozen=True)
class Family:
    """One family: its model, the arguments of a call, and what `accelerate` replaces in it.

    Attributes:
        build: the model, in evaluation mode, with random weights.
        inputs: arguments of its ``forward``, with padding where the family takes a mask.
        around: finds the modules whose outputs are compared, those that hold the attentions.
        attentions: how many deformable attentions are replaced.
    """

    build: Callable[[], nn.Module]
    inputs: Callable[[], dict[str, Tensor]]
    around: Callable[[Any], list[nn.Module]]
    attentions: int


def pixels(*, masked: bool) -> dict[str, Tensor]:
    """Two images ``[2, 3, 96, 160]``; the second has padding where ``masked``.

    The smallest map of Deformable DETR has 2 x 3 pixels: the normalisation of a single pixel would
    magnify rounding errors.
    """
    generator = torch.Generator().manual_seed(0)
    found = {"pixel_values": torch.randn(2, 3, 96, 160, generator=generator)}
    if masked:
        mask = torch.ones(2, 96, 160, dtype=torch.int64)
        mask[1, 80:] = 0
        mask[1, :, 112:] = 0
        found["pixel_mask"] = mask
    return found


_SMALL = {
    "d_model": 32,
    "encoder_layers": 2,
    "decoder_layers": 2,
    "encoder_attention_heads": 4,
    "decoder_attention_heads": 4,
    "encoder_ffn_dim": 16,
    "decoder_ffn_dim": 16,
}


def _deformable_detr() -> nn.Module:
    config = transformers.DeformableDetrConfig(
        **_SMALL, num_queries=12, backbone_config=_resnet(), use_timm_backbone=False, num_labels=5
    )
    return transformers.DeformableDetrForObjectDetection(config)


def _text() -> Any:
    return transformers.BertConfig(
        vocab_size=64,
        hidden_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=16,
        max_position_embeddings=32,
    )


def _grounding(name: str) -> nn.Module:
    config = getattr(transformers, f"{name}Config")(
        **_SMALL,
        num_queries=12,
        backbone_config=_swin(_STAGES),
        text_config=_text(),
        max_text_len=32,
    )
    return getattr(transformers, f"{name}ForObjectDetection")(config)


def _grounding_inputs() -> dict[str, Tensor]:
    words = torch.tensor([[101 % 64, 5, 6, 7, 8, 9]] * 2)
    return {
        **pixels(masked=True),
        "input_ids": words,
        "attention_mask": torch.ones_like(words),
        "token_type_ids": torch.zeros_like(words),
    }


def _mask2former() -> nn.Module:
    config = transformers.Mask2FormerConfig(
        backbone_config=_swin(["stage1", *_STAGES]),
        feature_size=32,
        mask_feature_size=32,
        hidden_dim=32,
        encoder_layers=2,
        decoder_layers=2,
        num_attention_heads=4,
        encoder_feedforward_dim=16,
        dim_feedforward=16,
        num_queries=8,
        num_labels=5,
    )
    return transformers.Mask2FormerForUniversalSegmentation(config)


def _oneformer() -> nn.Module:
    config = transformers.OneFormerConfig(
        backbone_config=_swin(["stage1", *_STAGES]),
        conv_dim=32,
        mask_dim=32,
        hidden_dim=32,
        encoder_layers=2,
        decoder_layers=2,
        num_attention_heads=4,
        encoder_feedforward_dim=16,
        dim_feedforward=16,
        num_queries=8,
        num_labels=5,
        text_encoder_width=32,
        text_encoder_context_length=8,
        text_encoder_num_layers=1,
        text_encoder_vocab_size=64,
        task_seq_len=8,
        use_auxiliary_loss=False,
    )
    return transformers.OneFormerForUniversalSegmentation(config)


def _oneformer_inputs() -> dict[str, Tensor]:
    return {**pixels(masked=True), "task_inputs": torch.arange(16.0).view(2, 8)}


def _omdet() -> nn.Module:
    config = transformers.OmDetTurboConfig(
        backbone_config=_swin(_STAGES),
        text_config=transformers.CLIPTextConfig(
            vocab_size=64,
            hidden_size=16,
            intermediate_size=16,
            num_hidden_layers=1,
            num_attention_heads=2,
            projection_dim=16,
            max_position_embeddings=16,
        ),
        apply_layernorm_after_vision_backbone=False,  # timm's Swin has channels last, this has not
        image_size=64,
        num_queries=8,
        num_feature_levels=3,
        vision_features_channels=[32, 32, 32],
        encoder_hidden_dim=32,
        decoder_hidden_dim=32,
        d_model=32,
        encoder_in_channels=[16, 32, 64],
        class_embed_dim=16,
        task_encoder_hidden_dim=16,
        text_projection_in_dim=16,
        text_projection_out_dim=16,
        decoder_num_heads=4,
        decoder_num_layers=2,
        encoder_dim_feedforward=16,
        decoder_dim_feedforward=16,
    )
    return transformers.OmDetTurboForObjectDetection(config)


def _omdet_inputs() -> dict[str, Tensor]:
    words, tasks = torch.arange(3, 15).view(4, 3), torch.arange(3, 11).view(2, 4)
    return {
        "pixel_values": pixels(masked=False)["pixel_values"][..., :64, :64],
        "classes_input_ids": words,
        "classes_attention_mask": torch.ones_like(words),
        "tasks_input_ids": tasks,
        "tasks_attention_mask": torch.ones_like(tasks),
        "classes_structure": torch.tensor([2, 2]),
    }


FAMILIES = {
    "Deformable DETR": Family(
        _deformable_detr,
        lambda: pixels(masked=True),
        lambda m: [m.model.encoder, m.model.decoder],
        4,
    ),
    "GroundingDINO": Family(
        lambda: _grounding("GroundingDino"),
        _grounding_inputs,
        lambda m: [m.model.encoder, m.model.decoder],
        4,
    ),
    "MM-GroundingDINO": Family(
        lambda: _grounding("MMGroundingDino"),
        _grounding_inputs,
        lambda m: [m.model.encoder, m.model.decoder],
        4,
    ),
    "Mask2Former": Family(
        _mask2former,
        lambda: pixels(masked=True),
        lambda m: [m.model.pixel_level_module.decoder.encoder],
        2,
    ),
    "OneFormer": Family(
        _oneformer, _oneformer_inputs, lambda m: [m.model.pixel_level_module.decoder.encoder], 2
    ),
    "OmDet-Turbo": Family(_omdet, _omdet_inputs, lambda m: [m.decoder], 2),
}

# Families whose operator serves 300 queries of a decoder, by the names of their models.
LEFT_ALONE = {
    "RT-DETR": "RTDetr",
    "RT-DETRv2": "RTDetrV2",
    "D-FINE": "DFine",
    "DEIMv2": "Deimv2",
    "LW-DETR": "LwDetr",
    "RF-DETR": "RfDetr",
    "PP-DocLayoutV2": "PPDocLayoutV2",
    "PP-DocLayoutV3": "PPDocLayoutV3",
    "PP-DocLayoutV4": "PPDocLayoutV4",
}


def left_alone(name: str) -> nn.Module:
    """Build a model of ``LEFT_ALONE`` in its usual size, without memory for the weights."""
    prefix = LEFT_ALONE[name]
    config = getattr(transformers, f"{prefix}Config")()
    with torch.device("meta"):
        return getattr(transformers, f"{prefix}ForObjectDetection")(config)
