"""One public function per op; a torch reference, and device code behind it."""
