# The two commands of the project: `make demo` and `make test`.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
DONE := $(VENV)/.installed
LOCK := requirements/lock.txt
UV := .venv-uv/bin/uv

.PHONY: demo test tests test-all bench torture fuzz fuzzer mutants test-newest test-lowest lint types
.PHONY: docs docs-site docs-links coverage-models lock

demo: $(DONE)
	$(BIN)/svdpeft compare --no-search --out runs/demo

test: lint
	$(MAKE) --jobs 2 types tests

tests: $(DONE)
	$(BIN)/python -m pytest -n auto --dist loadgroup

# Every variant of every method on every layer; `make test` has a covering set of them: docs/architecture.md, "Tests".
test-all: lint types
	$(BIN)/python -m pytest -n auto --dist loadgroup --all

# Time beside Hugging Face PEFT, twenty minutes on a quiet machine; writes benchmarks/results/speed-cpu-*.
bench: $(DONE)
	$(BIN)/python -m benchmarks.speed

# What tests/ has a few seconds of, half an hour on two cores: 100,000 damaged files, 50,000 of them adapters, 4,000 of each
# other reader, and the rest steered by the lines they reach; 200 kills of each writer at least, and a full disk; two
# minutes of threads that share a model; 2,000 attachments and 60 trainings in one process. The longest first.
TORTURES := damage-50000 comparing-200 readers-4000 writers-200 guided-1300 training-200 serving-120 soak-2000 saving-200
torture: fuzzer
	$(MAKE) --jobs 2 $(TORTURES:%=torture-%)

torture-%: $(DONE)
	@set -- $(subst -, ,$*); case $$1 in saving|writers|training|comparing) folder=$$(mktemp -d);; *) folder=;; esac; \
	$(BIN)/python tests/torture/$$1.py $$folder $$2 && rm -rf $$folder

# The steered ones alone, as many of each reader as one likes.
fuzz: fuzzer
	$(BIN)/python tests/torture/guided.py 2000

fuzzer: $(DONE)
	@$(BIN)/python -c "import atheris" 2>/dev/null || $(LOCKED) --editable ".[fuzz]"

# One deliberate defect after the other, and the test that notices: tests/mutants/README.md.
mutants: $(DONE)
	$(BIN)/python tests/mutants/run.py

# Without the lock, on Python 3.10, 3.12 and 3.13 where they are found; PYTHONS="3.12" chooses.
test-newest test-lowest: $(UV)
	UV=$(UV) .ci/versions $(@:test-%=%)

# Every family of timm and many architectures of transformers; writes docs/coverage-*.md.
coverage-models: $(DONE)
	$(BIN)/python -m benchmarks.coverage timm
	$(BIN)/python -m benchmarks.coverage transformers

# A page and a picture per method, made from the classes.
docs: $(DONE)
	$(BIN)/python docs/build.py

# The documentation as a site, build/site/index.html. Every warning is an error, a dead link within the site among them;
# SVDPEFT_INTERSPHINX=1 links to the references of torch and others, whose lists of names it fetches.
SPHINX := $(BIN)/python -m sphinx --fail-on-warning --keep-going --fresh-env -c docs
docs-site: $(DONE)
	$(SPHINX) . build/site

# Whether the addresses of others still answer.
docs-links: $(DONE)
	$(SPHINX) -b linkcheck . build/links

lint: $(DONE)
	$(BIN)/ruff check
	$(BIN)/ruff format --check

types: $(DONE)
	$(BIN)/pyright

# Everything comes from pyproject.toml, in the versions of the lock, so that a release of tomorrow changes nothing here.
# The stamp makes a second run start at once.
INSTALL := $(BIN)/python -m pip install --quiet
LOCKED := $(INSTALL) --constraint $(LOCK)
$(DONE): pyproject.toml $(LOCK)
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	@{ $(LOCKED) pip && $(LOCKED) --build-constraint $(LOCK) --editable ".[test]"; } || \
	{ echo "$(LOCK) cannot be installed here (see above): installing the newest versions instead" && \
	$(INSTALL) --upgrade pip && $(INSTALL) --editable ".[test]"; }
	touch $(DONE)

# The newest versions for Python 3.10 and later, and of what builds and installs them. What pip is configured to hold
# back is held back here, too.
lock: $(UV)
	printf 'hatchling\npip\n' | UV_CONSTRAINT="$$($(PYTHON) -m pip config list | sed -n "s/^global.constraint='\(.*\)'$$/\1/p")" \
	$(UV) pip compile --quiet --upgrade --universal --python-version 3.10 --extra test --no-annotate \
	--custom-compile-command "make lock" --output-file $(LOCK) pyproject.toml -

$(UV):
	$(PYTHON) -m venv .venv-uv
	.venv-uv/bin/python -m pip install --quiet uv
