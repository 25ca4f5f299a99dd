"""Connections, upstreams and tunnels: carries out what routing decided."""
