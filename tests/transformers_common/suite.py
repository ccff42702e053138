"""The classes of this repository under transformers' own common tests. `run.py` puts this file among those tests, as
tests/models/vqrae/test_vqrae.py; it imports them relatively and cannot run elsewhere."""

import unittest

from torch import nn

from configuration_simvq import VQRAEConfig
from configuration_simvq_gan import SimVQGANConfig
from image_processing_simvq import VQRAEImageProcessor
from modeling_simvq import VQRAEModel
from modeling_simvq_gan import SimVQGANModel

from ... import test_modeling_common as common
from ...test_configuration_common import ConfigTester
from ...test_image_processing_common import ImageProcessingTester, ImageProcessingTestMixin


without_init = common._config_zero_init


def without_init_but_of_pixels(config):
    """The common tests set every field named like a standard deviation to almost zero; that of pixels is none."""
    changed = without_init(config)
    if hasattr(config, "image_std"):
        changed.image_std = list(config.image_std)
    return changed


common._config_zero_init = without_init_but_of_pixels


class TinyTokenizer:
    """Makes configurations and inputs; its attributes are what the common tests expect of outputs."""

    batch_size, image_size, num_channels = 2, 16, 3
    hidden_size, num_hidden_layers, num_attention_heads = 32, 2, 4
    seq_length = 1 + (16 // 4) ** 2  # of the decoder: a cls token and the patches
    is_training = True

    def __init__(self, make_config) -> None:
        self.get_config = make_config

    def prepare_config_and_inputs_for_common(self):
        return self.get_config(), {"pixel_values": common.floats_tensor([self.batch_size, 3, 16, 16])}


def tokenizer(encoder: dict, **fields):
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "patch_size": 4, "image_size": 16}
    fields = {"image_size": 16, "decoder_patch_size": 4, "codebook_size": 64, **fields}
    return lambda: VQRAEConfig(encoder_config=sizes | encoder, **fields)


class CommonTests(common.ModelTesterMixin):
    all_model_classes = (VQRAEModel,)
    test_resize_embeddings = False
    make_config = None

    def setUp(self):
        self.model_tester = TinyTokenizer(type(self).make_config)

    def test_model_get_set_embeddings(self):
        """As the tests of vision models of transformers have it: patches are embedded by another module than words."""
        for model_class in self.all_model_classes:
            model, other = model_class(self.model_tester.get_config()), nn.Linear(10, 10)
            self.assertIsInstance(model.get_input_embeddings(), nn.Module)
            model.set_input_embeddings(other)
            self.assertIs(model.get_input_embeddings(), other)
            self.assertIsNone(model.get_output_embeddings())


class FrozenSiglip(CommonTests, unittest.TestCase):
    make_config = tokenizer({"model_type": "siglip_vision_model", "intermediate_size": 64})


class TrainedSiglip(CommonTests, unittest.TestCase):
    make_config = tokenizer({"model_type": "siglip_vision_model", "intermediate_size": 64}, freeze_encoder=False)


class ProjectedDinov2(CommonTests, unittest.TestCase):
    make_config = tokenizer({"model_type": "dinov2"}, freeze_encoder=False, codebook_dim=8)


class PlainCodebookOnMae(CommonTests, unittest.TestCase):
    make_config = tokenizer({"model_type": "vit_mae", "intermediate_size": 64}, freeze_encoder=False, use_simvq=False)


def convolutional():
    sizes = {"base_channels": 32, "channel_multiplier": [1, 1], "num_res_blocks": 1, "latent_channels": 8}
    return SimVQGANConfig(**sizes, image_size=16, codebook_size=64)


class Convolutional(CommonTests, unittest.TestCase):
    all_model_classes = (SimVQGANModel,)
    has_attentions = False
    make_config = convolutional


class Configurations(unittest.TestCase):
    def test_common(self):
        for config_class, fields in ((VQRAEConfig, {"codebook_size": 77}), (SimVQGANConfig, {"base_channels": 64})):
            with self.subTest(config_class.__name__):
                tester = ConfigTester(self, config_class, has_text_modality=False, common_properties=[], **fields)
                tester.run_common_tests()


class TinyProcessor(ImageProcessingTester):
    def __init__(self, parent, **options):
        sizes = {"size": {"shortest_edge": 20}, "crop_size": {"height": 18, "width": 18}}
        super().__init__(parent, **sizes, do_resize=True, do_center_crop=True, **options)

    def _get_image_processing_classes(self):
        return {"torchvision": VQRAEImageProcessor}


class Processor(ImageProcessingTestMixin, unittest.TestCase):
    image_processor_tester_class = TinyProcessor


del CommonTests  # it has no configuration of its own
