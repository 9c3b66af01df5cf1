"""distconv: synchronous data-parallel training of a convolutional network over MPI.

Importing the package starts nothing: no MPI, no GPU, no compilation.

Letters for shapes, the same in every file:
N samples of a batch, H and W height and width, C channels in, F filters (channels out), K filter or window size,
P ranks. Images and activations are (N, H, W, C); filters are (K, K, C, F).
"""

__version__ = "0.1.0"
