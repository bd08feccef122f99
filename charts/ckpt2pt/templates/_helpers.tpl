{{/* Beginning of the names of all objects; short enough for what is put behind it. */}}
{{- define "ckpt2pt.fullname" -}}
{{- $name := .Values.nameOverride | default .Chart.Name -}}
{{- if .Values.fullnameOverride -}}
{{- .Values.fullnameOverride | trunc 40 | trimSuffix "-" -}}
{{- else if contains $name .Release.Name -}}
{{- .Release.Name | trunc 40 | trimSuffix "-" -}}
{{- else -}}
{{- printf "%s-%s" .Release.Name $name | trunc 40 | trimSuffix "-" -}}
{{- end -}}
{{- end -}}

{{/* By which the Deployment finds its pods.  Must never change. */}}
{{- define "ckpt2pt.selectorLabels" -}}
app.kubernetes.io/name: {{ .Values.nameOverride | default .Chart.Name }}
app.kubernetes.io/instance: {{ .Release.Name }}
app.kubernetes.io/component: operator
{{- end -}}

{{- define "ckpt2pt.labels" -}}
{{- $labels := include "ckpt2pt.selectorLabels" . | fromYaml -}}
{{- $_ := set $labels "app.kubernetes.io/version" .Chart.AppVersion -}}
{{- $_ := set $labels "app.kubernetes.io/managed-by" .Release.Service -}}
{{- $_ := set $labels "helm.sh/chart" (printf "%s-%s" .Chart.Name (.Chart.Version | replace "+" "_")) -}}
{{- toYaml (merge $labels .Values.commonLabels) -}}
{{- end -}}

{{/* Pods that the operator makes, in whatever namespace: ckpt2pt.kube.conversion.job. */}}
{{- define "ckpt2pt.workerLabels" -}}
app.kubernetes.io/name: ckpt2pt
app.kubernetes.io/component: worker
app.kubernetes.io/managed-by: ckpt2pt-operator
{{- end -}}

{{/*
Reference of an image: called with (list $ .Values.image).  image.registry is that of both images, where another one is not given and
the repository does not begin with a registry itself.
*/}}
{{- define "ckpt2pt.image" -}}
{{- $root := index . 0 -}}
{{- $image := index . 1 -}}
{{- $repository := $image.repository -}}
{{- $hasRegistry := regexMatch "^(localhost|[^/]*[.][^/]*)/" $repository -}}
{{- $registry := $image.registry | default (ternary "" $root.Values.image.registry $hasRegistry) -}}
{{- if not (or $registry (contains "/" $repository)) -}}
{{- fail "image.registry is not given, and no image of ckpt2pt is published: build and push both images (README.md, Install it on a cluster), then --set image.registry=REGISTRY. It is docker.io/library for images that the nodes were given by their bare names" -}}
{{- end -}}
{{- with $registry }}{{ . | trimSuffix "/" }}/{{ end -}}
{{- $repository -}}
{{- if $image.digest }}@{{ $image.digest }}{{ else }}:{{ $image.tag | default $root.Chart.AppVersion }}{{ end -}}
{{- end -}}

{{- define "ckpt2pt.serviceAccountName" -}}
{{- .Values.serviceAccount.name | default (printf "%s-operator" (include "ckpt2pt.fullname" .)) -}}
{{- end -}}

{{/* Name of the CustomResourceDefinition's objects, of the Lease, and of the Service, in one place each. */}}
{{- define "ckpt2pt.leaseName" -}}
{{- include "ckpt2pt.fullname" . }}-operator
{{- end -}}

{{/* Permissions of worker.allow that are given, by comma. */}}
{{- define "ckpt2pt.allowed" -}}
{{- $names := list -}}
{{- range $name, $given := .Values.worker.allow -}}
{{- if $given -}}
{{- $names = append $names $name -}}
{{- end -}}
{{- end -}}
{{- join "," $names -}}
{{- end -}}

{{/* Kinds of trainings that are enabled, as the operator reads them with --training-kinds. */}}
{{- define "ckpt2pt.trainingKinds" -}}
{{- $kinds := list -}}
{{- range $name, $kind := .Values.trainingKinds -}}
{{- if $kind.enabled -}}
{{- $kinds = append $kinds (omit $kind "enabled") -}}
{{- end -}}
{{- end -}}
{{- toYaml $kinds -}}
{{- end -}}
