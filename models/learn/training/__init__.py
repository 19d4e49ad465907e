"""How towers and CVR head are trained."""
