def check(config, held_out):
  pass


def evaluate(*a):
  return {}


def table(l):
  return ""


def without_terms(l):
  return l


def terms(l):
  return None
