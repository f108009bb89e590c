"""Triton kernels. A file reads in the order a tensor meets it: derivation, kernels, launchers. Nothing here registers
operators (hypercontrast/_ops.py does), and importing this package imports no Triton: its modules do."""
