"""GroundingDINO, SAM and SAM 2 checkpoints small enough for tests: random weights, real classes."""

import json
from pathlib import Path

import torch
import transformers as tf

from data_pipelines.maskers.prompts import DEFAULT_PROMPTS

# The model looks for [CLS], [SEP], "." and "?" under these ids of BERT's vocabulary.
SPECIAL = {
    0: "[PAD]",
    100: "[UNK]",
    101: "[CLS]",
    102: "[SEP]",
    103: "[MASK]",
    1012: ".",
    1029: "?",
}
WORDS = sorted({word for p in DEFAULT_PROMPTS for phrase in p.prompts for word in phrase.split()})


def write_detector(folder: Path) -> Path:
    torch.manual_seed(0)
    vocab = [SPECIAL.get(i, f"[unused{i}]") for i in range(1030)] + WORDS
    config = tf.GroundingDinoConfig(
        backbone_config=tf.SwinConfig(
            image_size=64,
            embed_dim=8,
            depths=[1, 1, 1, 1],
            num_heads=[1, 1, 1, 1],
            window_size=4,
            out_indices=[2, 3, 4],
        ),
        text_config=tf.BertConfig(
            vocab_size=len(vocab),
            hidden_size=16,
            num_hidden_layers=1,
            num_attention_heads=2,
            intermediate_size=16,
            max_position_embeddings=256,
        ),
        d_model=32,
        encoder_layers=1,
        decoder_layers=2,
        encoder_attention_heads=2,
        decoder_attention_heads=2,
        encoder_ffn_dim=16,
        decoder_ffn_dim=16,
        num_queries=12,
        encoder_n_points=2,
        decoder_n_points=2,
    )
    tf.GroundingDinoForObjectDetection(config).save_pretrained(folder)
    pictures = tf.GroundingDinoImageProcessorPil(size={"shortest_edge": 64, "longest_edge": 107})
    tokenizer = tf.BertTokenizer(vocab={word: i for i, word in enumerate(vocab)})
    tf.GroundingDinoProcessor(pictures, tokenizer).save_pretrained(folder)
    return folder


def write_sam(folder: Path) -> Path:
    torch.manual_seed(1)
    config = tf.SamConfig(
        vision_config=tf.SamVisionConfig(
            hidden_size=16,
            num_hidden_layers=1,
            num_attention_heads=2,
            image_size=64,
            patch_size=8,
            output_channels=16,
            window_size=4,
            global_attn_indexes=[0],
            mlp_dim=16,
            num_pos_feats=8,
            initializer_range=0.1,
        ),
        prompt_encoder_config=tf.SamPromptEncoderConfig(
            hidden_size=16, image_size=64, patch_size=8, mask_input_channels=4
        ),
        mask_decoder_config=tf.SamMaskDecoderConfig(
            hidden_size=16,
            mlp_dim=16,
            num_hidden_layers=1,
            num_attention_heads=2,
            iou_head_hidden_dim=16,
        ),
        initializer_range=0.3,
    )
    tf.SamModel(config).save_pretrained(folder)
    tf.SamProcessor(
        tf.SamImageProcessorPil(
            size={"longest_edge": 64},
            pad_size={"height": 64, "width": 64},
            mask_size={"longest_edge": 32},
            mask_pad_size={"height": 32, "width": 32},
        )
    ).save_pretrained(folder)
    return folder


def write_sam2(folder: Path) -> Path:
    torch.manual_seed(2)
    config = tf.Sam2Config(
        vision_config=tf.Sam2VisionConfig(
            backbone_config=tf.Sam2HieraDetConfig(
                hidden_size=8,
                num_attention_heads=1,
                image_size=[64, 64],
                blocks_per_stage=[1, 2, 2, 1],
                embed_dim_per_stage=[8, 16, 32, 64],
                num_attention_heads_per_stage=[1, 1, 1, 1],
                window_size_per_stage=[8, 4, 8, 4],
                window_positional_embedding_background_size=[4, 4],
                global_attention_blocks=[4],
            ),
            backbone_channel_list=[64, 32, 16, 8],
            backbone_feature_sizes=[[16, 16], [8, 8], [4, 4]],
            fpn_hidden_size=16,
        ),
        prompt_encoder_config=tf.Sam2PromptEncoderConfig(
            hidden_size=16, image_size=64, patch_size=16, mask_input_channels=4
        ),
        mask_decoder_config=tf.Sam2MaskDecoderConfig(
            hidden_size=16,
            mlp_dim=16,
            num_hidden_layers=1,
            num_attention_heads=2,
            iou_head_hidden_dim=16,
            iou_head_depth=2,
        ),
        initializer_range=0.3,
    )
    tf.Sam2Model(config).save_pretrained(folder)
    size = {"height": 64, "width": 64}
    # The form in which the hub has it.
    content = {"image_processor_type": "Sam2ImageProcessorFast", "size": size, "resample": 2}
    (folder / "preprocessor_config.json").write_text(json.dumps(content))
    return folder
