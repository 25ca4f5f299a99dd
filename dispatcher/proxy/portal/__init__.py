"""The portal: the proxy's own pages.  One more upstream to the edge; holds no key and no credential."""
