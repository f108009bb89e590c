"""Named settings, one small YAML file each: `<dataset>-<loss>.yaml`. Read by `hypercontrast.config`."""
