# Both images for both architectures:  REGISTRY=registry.example.com/team docker buildx bake --push
# Each variable is taken from the environment.  `make push` does the same with buildah.
variable "REGISTRY" { default = "" }
variable "VERSION" { default = "0.1.0" }
variable "REVISION" { default = "unknown" }
variable "SOURCE" { default = "" } # URL of the repository
variable "BASE_IMAGE" { default = "" }
variable "SBOM" { default = false } # its scanner is an image of Docker's, which has to be pulled

group "default" { targets = ["operator", "converter"] }

target "common" {
  platforms = ["linux/amd64", "linux/arm64"]
  attest    = concat(["type=provenance,mode=max"], SBOM ? ["type=sbom"] : [])
  labels    = SOURCE != "" ? { "org.opencontainers.image.source" = SOURCE } : {}
  args = {
    VERSION    = VERSION
    REVISION   = REVISION
    BASE_IMAGE = BASE_IMAGE != "" ? BASE_IMAGE : null
  }
}

target "operator" {
  inherits = ["common"]
  target   = "operator"
  tags     = [trimprefix("${REGISTRY}/ckpt2pt-operator:${VERSION}", "/")]
}

target "converter" {
  inherits = ["common"]
  target   = "converter"
  tags     = [trimprefix("${REGISTRY}/ckpt2pt:${VERSION}", "/")]
}
