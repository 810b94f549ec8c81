"""A GGUF runtime for hybrid Qwen3.5 targets with DFlash drafting and DDTree verification."""
