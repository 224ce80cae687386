"""What readers of tables and plots are told instead of the names of the code."""

METHODS = {"escnn": "escnn", "escnn_compiled": "escnn, torch.compile", "torch": "plain, of equal width",
           "twin": "plain, of equal parameters",
           "equiconv": "equiconv", "equiconv_dense": "equiconv, dense", "equiconv_factorised": "equiconv, factorised",
           "equiconv_two_pass": "equiconv, two passes", "equiconv_fused": "equiconv, fused",
           "equiconv_convolutions": "equiconv, convolutions alone",
           "equiconv_irreps": "equiconv, irreps between convolutions"}
MODES = {"training": "training step", "forward": "forward", "inference": "inference", "expand": "filter expansion",
         "expand_training": "filter expansion, forward and backward", "warm": "construction",
         "warm_no_init": "construction without initialisation", "cold": "construction without caches",
         "cold_no_init": "construction without initialisation or caches"}
