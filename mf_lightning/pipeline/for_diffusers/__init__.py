"""What diffusers loads out of a folder that `export --to diffusers` made: these files are copied into it."""
