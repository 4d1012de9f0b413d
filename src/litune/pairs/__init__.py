"""What people have → `Pairs`: images with captions or classes, wherever they lie."""
