"""Machinery for training programs, independent of MobileOne; imports only itself, utils and libraries."""
