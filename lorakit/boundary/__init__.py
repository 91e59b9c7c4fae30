"""The boundary layer: where a LoRA stops doing good, and dropping it there."""
