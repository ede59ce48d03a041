"""What the programs about text-to-image models share: diffuse, erase, attack and defend."""
