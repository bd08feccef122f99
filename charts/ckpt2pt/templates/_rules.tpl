{{/*
What the operator may do in a namespace that it serves.  One place: each call that it makes has its verb here, and the
tests compare this with what it asks for.
*/}}
{{- define "ckpt2pt.operatorRules" -}}
- apiGroups: [ckpt2pt.dev]
  resources: [checkpointconversions]
  verbs: [get, list, watch{{ if .Values.trainingTrigger.enabled }}, create{{ end }}{{ if .Values.operator.deleteFinished }}, delete{{ end }}]
- apiGroups: [ckpt2pt.dev]
  resources: [checkpointconversions/status]
  verbs: [update]
- apiGroups: [batch]
  resources: [jobs]
  verbs: [get, list, watch, create, patch, delete]
- apiGroups: [""]
  resources: [pods]
  verbs: [list, watch]
- apiGroups: [""]
  resources: [events]
  verbs: [list, create, patch]
{{- if .Values.operator.checkVolumes }}
- apiGroups: [""]
  resources: [persistentvolumeclaims]
  verbs: [get]
{{- end }}
{{- if .Values.trainingTrigger.enabled }}
- apiGroups: [""]
  resources: [configmaps]
  verbs: [get]
{{- end }}
{{- range $name, $kind := .Values.trainingKinds }}
{{- $group := "" }}
{{- if contains "/" $kind.apiVersion }}{{ $group = first (splitList "/" $kind.apiVersion) }}{{ end }}
{{- if and $kind.enabled (not (and (eq $group "batch") (eq $kind.plural "jobs"))) }}
- apiGroups: [{{ $group | quote }}]
  resources: [{{ $kind.plural }}]
  verbs: [get, list, watch]
{{- end }}
{{- end }}
{{- end -}}

{{/* What cannot be limited to a namespace: to see that the CustomResourceDefinition is there. */}}
{{- define "ckpt2pt.clusterRules" -}}
- apiGroups: [apiextensions.k8s.io]
  resources: [customresourcedefinitions]
  resourceNames: [checkpointconversions.ckpt2pt.dev]
  verbs: [list, watch]
{{- end -}}

{{- define "ckpt2pt.viewRules" -}}
- apiGroups: [ckpt2pt.dev]
  resources: [checkpointconversions, checkpointconversions/status]
  verbs: [get, list, watch]
{{- end -}}

{{- define "ckpt2pt.editRules" -}}
- apiGroups: [ckpt2pt.dev]
  resources: [checkpointconversions]
  verbs: [get, list, watch, create, update, patch, delete, deletecollection]
- apiGroups: [ckpt2pt.dev]
  resources: [checkpointconversions/status]
  verbs: [get]
{{- end -}}

{{- define "ckpt2pt.submitRules" -}}
- apiGroups: [ckpt2pt.dev]
  resources: [checkpointconversions]
  verbs: [create]
{{- end -}}
