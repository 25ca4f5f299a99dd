"""One TOML file -> validated models; discovery of plugins; default locations."""
