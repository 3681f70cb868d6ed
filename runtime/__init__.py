"""What a program that trains needs and that knows nothing of MobileOne; imports only itself, utils and libraries."""
