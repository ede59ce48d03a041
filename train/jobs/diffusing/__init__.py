"""The modules that the text-to-image programs share: diffuse, erase, attack and defend."""
