"""Room for other libraries' file formats, one module each. There is none yet: see ``SAE.save_pretrained`` for ours."""
