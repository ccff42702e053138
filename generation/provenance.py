"""Which tokenizer tokens belong to."""

import hashlib
import json

from modeling_simvq import ImageTokenizer


# fields of a configuration, beside the weights, that decide which tokens an image has
SEEN = (
    "encoder_layers",
    "pixel_weight",
    "encoder_input_size",
    "decoder_patch_size",
    "image_mean",
    "image_std",
)


def tokenizer_hash(model: ImageTokenizer) -> str:
    """SHA-256 of what decides tokens: the encoder, the projection, the quantizer and the fields `SEEN`, in hexadecimal.

    Weights are taken in fp32, so a checkpoint that is stored in fp16 has the same hash as what it is loaded into. What
    paints (`project_out`, decoder) has no part in it: tokens stay those of a model whose decoder is trained further.
    """
    digest = hashlib.sha256(json.dumps([getattr(model.config, name, None) for name in SEEN]).encode())
    for part in (model.encoder, model.project_in, model.quantizer):
        for tensor in part.state_dict().values():
            digest.update(tensor.detach().float().cpu().contiguous().numpy().data)
    return digest.hexdigest()
