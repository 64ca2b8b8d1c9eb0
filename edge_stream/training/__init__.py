"""Training with a sink (Xiao et al. 2023, section 3.3): data, model, loop, checkpoint and export, one module each.

`edge-stream train` is a face over them. torch and transformers are imported by the modules only, never by this package.
"""
