"""Reading checkpoints: the safetensors reader, the rules engine, one file per model family."""
