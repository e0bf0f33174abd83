"""Parts with parameters that two or more backbones use, and the mixers."""
