{{/* Combinations that the schema cannot refuse.  Each says what to change. */}}
{{- define "ckpt2pt.checks" -}}
{{- $values := .Values -}}
{{- if and (gt (int $values.operator.replicas) 1) (not $values.operator.leaderElection.enabled) -}}
{{- fail "operator.replicas is more than 1: set operator.leaderElection.enabled to true, or two operators work against each other" -}}
{{- end -}}
{{- if and (not $values.serviceAccount.create) (not $values.serviceAccount.name) -}}
{{- fail "serviceAccount.create is false: give the name of an existing ServiceAccount in serviceAccount.name" -}}
{{- end -}}
{{- with $values.podDisruptionBudget -}}
{{- $whole := eq (toString .minAvailable) "100%" -}}
{{- if and .enabled (or $whole (and (not (kindIs "string" .minAvailable)) (ge (int .minAvailable) (int $values.operator.replicas)))) -}}
{{- fail "podDisruptionBudget.minAvailable keeps every operator: no node that runs one could be drained; make it less than operator.replicas" -}}
{{- end -}}
{{- end -}}
{{- if and (hasKey $values.worker.defaults "timeToLiveSeconds") (not $values.operator.deleteFinished) -}}
{{- fail "worker.defaults.timeToLiveSeconds: set operator.deleteFinished to true, or nothing is deleted" -}}
{{- end -}}
{{- if and $values.networkPolicy.workers.enabled (not $values.networkPolicy.enabled) -}}
{{- fail "networkPolicy.workers.enabled needs networkPolicy.enabled" -}}
{{- end -}}
{{- if and $values.networkPolicy.workers.enabled (not $values.networkPolicy.workers.namespaces) (not $values.watchNamespaces) -}}
{{- fail "networkPolicy.workers.enabled: name the namespaces in networkPolicy.workers.namespaces; a NetworkPolicy cannot stand for all of them" -}}
{{- end -}}
{{- if not (.Capabilities.APIVersions.Has "monitoring.coreos.com/v1") -}}
{{- range $name := list "serviceMonitor" "podMonitor" "prometheusRule" -}}
{{- if (index $values.metrics $name).enabled -}}
{{- fail (printf "metrics.%s.enabled needs the Prometheus Operator, whose API monitoring.coreos.com/v1 is not in this cluster: install it first, set this to false, or pass --api-versions monitoring.coreos.com/v1 to helm template" $name) -}}
{{- end -}}
{{- end -}}
{{- end -}}
{{- end -}}
