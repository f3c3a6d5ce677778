"""Selection of the layers that lose least by streaming: strategies (one file each), the choice, the layer profile, its picture."""
