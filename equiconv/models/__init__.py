"""Published networks, each built from a namespace of layers: escnn.nn or equiconv.nn.

A network is one file: a function registered under its name, with its source. Importing the file registers it.
"""
from .c8_steerable_cnn import SteerableCNN, c8_steerable_cnn
from .conventional import CNN, WideResNet, cnn, wrn
from .deeplense_c4_cnn import deeplense_c4_cnn
from .e2sfcnn import E2SFCNN, e2sfcnn
from .e2wrn import E2WRN, e2wrn
from .equivariant_mlp import EquivariantMLP, equivariant_mlp
from .equivariant_transformer import EquivariantTransformer, ETNetwork, equivariant_transformer
from .exp_e2sfcnn import ExpE2SFCNN, exp_e2sfcnn
from .harmonic import HarmonicConv, ModulusBatchNorm, ModulusReLU
from .hnet import HNet, hnet
from .p4_cnn import P4CNN, p4_cnn
from .plain import PlainCNN, PlainCNN3D, cnn_3d, e2sf_cnn, exp_e2sf_cnn, hnet_cnn, plain_mlp, z2_cnn
from .registry import citation, complexity, create, group, input_shape, names, register, twin
from .se3_cnn import SE3CNN, se3_cnn
from .segmentation import SE3Segmenter, cnn_segmenter, se3_segmenter

__all__ = ["CNN", "E2SFCNN", "E2WRN", "ETNetwork", "EquivariantMLP", "EquivariantTransformer",
           "ExpE2SFCNN", "HNet", "HarmonicConv", "ModulusBatchNorm", "ModulusReLU", "P4CNN", "PlainCNN", "PlainCNN3D",
           "SE3CNN", "SE3Segmenter", "SteerableCNN", "WideResNet", "c8_steerable_cnn", "citation", "cnn", "cnn_3d",
           "cnn_segmenter", "complexity", "create", "deeplense_c4_cnn", "e2sf_cnn", "e2sfcnn", "e2wrn",
           "equivariant_mlp", "equivariant_transformer", "exp_e2sf_cnn", "exp_e2sfcnn", "group", "hnet", "hnet_cnn",
           "input_shape", "names", "p4_cnn", "plain_mlp", "register", "se3_cnn", "se3_segmenter", "twin", "wrn",
           "z2_cnn"]
