"""What recorded calls compute on a GPU, in Triton: few large kernels instead of many small ones.

Only imported where there is a GPU: torch for CPUs comes without triton. The torch operations that each takes the place
of are model.graphs.torch_layers; tests compare the two, here with Triton's interpreter.
"""
