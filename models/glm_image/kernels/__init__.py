"""Triton kernels of the planner's decode step.

A row has the same bits in any batch. A CUDA graph can hold them: grids are static, lengths are read from the device.
"""
