"""Tiny random multimodal models, and batches with images in them."""

import torch
from transformers import (
    CONFIG_MAPPING,
    AutoModelForImageTextToText,
    CLIPVisionConfig,
    Gemma3Config,
    LlavaConfig,
    Mistral3Config,
    PixtralVisionConfig,
    SiglipVisionConfig,
)

IMAGE = 63
VISION = {
    "hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2,
    "image_size": 8, "patch_size": 4,
}  # fmt: skip
TEXT = {
    "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 4, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 8, "vocab_size": 64, "max_position_embeddings": 128,
    "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip


def _llava(text):
    return LlavaConfig(
        text_config=text, vision_config=CLIPVisionConfig(**VISION), image_token_id=IMAGE,
        image_seq_length=4, vision_feature_layer=-1,
    )  # fmt: skip


def _gemma3(text):
    return Gemma3Config(
        text_config=text, vision_config=SiglipVisionConfig(**VISION), image_token_id=IMAGE,
        mm_tokens_per_image=4,
    )  # fmt: skip


def _mistral3(text):
    vision = PixtralVisionConfig(**VISION, head_dim=8)
    return Mistral3Config(
        text_config=text, vision_config=vision, image_token_id=IMAGE, spatial_merge_size=1,
        vision_feature_layer=-1,
    )  # fmt: skip


# Name → config of the whole, model type of the text part.
WRAPPERS = {
    "llava": (_llava, "llama"),
    "llava_mistral": (_llava, "mistral"),
    "gemma3": (_gemma3, "gemma3_text"),
    "mistral3": (_mistral3, "mistral"),
}


def tiny_wrapper(name, *, seed=0, **options):
    """A random multimodal model; an image is four tokens of it."""
    make, family = WRAPPERS[name]
    state = torch.random.get_rng_state()
    torch.manual_seed(seed)
    config = make(CONFIG_MAPPING[family](**{**TEXT, **options}))
    model = AutoModelForImageTextToText.from_config(config).eval()
    for path, parameter in model.named_parameters():
        if "norm" not in path:
            parameter.data.normal_(0, 0.3 if parameter.ndim > 1 else 0.1)
    torch.random.set_rng_state(state)
    return model


def with_image(name, rows=2, seed=0):
    """A batch whose prompts hold an image each, as the processors of these models make it."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(3, 60, (rows, 12), generator=generator)
    ids[:, 2:6] = IMAGE
    batch = {
        "input_ids": ids,
        "attention_mask": torch.ones_like(ids),
        "pixel_values": torch.randn(rows, 3, 8, 8, generator=generator),
    }
    if name == "gemma3":
        batch["token_type_ids"] = (ids == IMAGE).long()
    if name == "mistral3":
        batch["image_sizes"] = torch.tensor([[8, 8]] * rows)
    return batch
