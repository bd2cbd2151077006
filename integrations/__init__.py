"""Bridges to other libraries; installed as ``torch_prunepath.integrations``. Each module imports its own library."""
