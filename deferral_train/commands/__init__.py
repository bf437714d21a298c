"""One file per command: typed parameters in, a call, a few printed lines. The logic lives in the layers below."""
